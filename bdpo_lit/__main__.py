"""`python -m bdpo_lit` is the `bdpo` command."""
from bdpo_lit.reference.command_line import main

main()
