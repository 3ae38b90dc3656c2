"""`python -m acip_kernels` is the `acip` command."""

from .cli import main

main()
