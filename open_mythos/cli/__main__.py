"""``python -m open_mythos.cli``, as ``torchrun -m`` runs it."""

from open_mythos.cli import main

main()
