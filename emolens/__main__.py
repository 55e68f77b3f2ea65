"""`python -m emolens`."""

from emolens.cli import main

if __name__ == "__main__":
    main()
