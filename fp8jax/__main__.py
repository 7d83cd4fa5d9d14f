"""`python -m fp8jax`: the command `fp8jax`."""

from fp8jax.cli import main

main()
