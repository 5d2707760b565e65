"""A small LLaVA that answers questions about scenes of scanned digits: data, model, training and evaluation."""
