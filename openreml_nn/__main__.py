"""``python -m openreml_nn`` is the console program."""

from openreml_nn.program.main import main

main()
