"""How sharp the tests are: faults that they must find, and what applies them to copies of the checkout."""
