"""`python -m fastgpt2.train`: train a GPT-2.

    # a model that suits this machine, on dummy tokens
    python -m fastgpt2.train
    # on text: Python's standard library, byte by byte
    python -m fastgpt2.train --data stdlib --lr 3e-3 --warmup-steps 40
    # continue a run
    python -m fastgpt2.train --resume --out runs/NAME --steps 2000

Nothing to import: importing a submodule binds it as an attribute of its package, so this module would hide the function
`fastgpt2.train`.
"""

if __name__ == "fastgpt2.train":
    raise ImportError("fastgpt2.train is a command (python -m fastgpt2.train); in Python: from fastgpt2 import train")

if __name__ == "__main__":
    from fastgpt2 import signals

    # Before the slow imports, so that a signal is answered while they last.
    signals.handle(signals.end_at_once)

    from fastgpt2.command import main
    from fastgpt2.console import run_command

    run_command(main)
