"""The code of the tutorials in the documentation; tests run it."""
