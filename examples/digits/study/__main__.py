"""``python -m examples.digits.study``."""

from .command import main

if __name__ == "__main__":
    main()
