"""`python -m vlmrewrite`: the command line."""

from vlmrewrite.cli import app

if __name__ == "__main__":
    app()
