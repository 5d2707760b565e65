"""A small LLaVA that reads pages of text: fonts, prose, questions, pages, model and training."""
