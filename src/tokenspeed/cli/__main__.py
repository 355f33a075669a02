"""`python -m tokenspeed.cli` is the `tokenspeed` command."""

from tokenspeed.cli.main import run

if __name__ == "__main__":
    run()
