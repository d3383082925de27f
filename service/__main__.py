"""`unlearn`, or `python -m service`."""

from service.importing import importing


def main() -> None:
    """Run the command line."""
    with importing():
        from service.cli import app

    app()


if __name__ == "__main__":
    main()
