"""`python -m toolchain` is `slimvit`."""

from toolchain.cli import main

if __name__ == "__main__":
    main()
