"""``evenstep bench``, the cost of an optimizer step next to other packages, and ``evenstep doctor``, the state of the
kernels. README.md has the reading order."""
