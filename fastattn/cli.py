"""The command `fastattn`: one module per subcommand, imported only when it is the one asked for.

A module has add_arguments(parser) and run(arguments, argv) -> exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback

from fastattn import __version__
from fastattn.errors import FastattnError

__all__ = ["main"]

COMMANDS = {
    "finetune": (
        "fastattn.finetune.command",
        "fine-tune a model on texts and report what fastattn changed",
    ),
    "predict": ("fastattn.finetune.predict", "label texts with a fine-tuned model, or let it write"),
    "icl": ("fastattn.finetune.icl", "label texts with a language model that is shown some labelled ones"),
    "bench": ("fastattn.bench.command", "time the kernels against torch and the machine's peak"),
    "explain": (
        "fastattn.explain_command",
        "which kernel would compute attention of given shapes, and its cost",
    ),
    "build-cuda": ("fastattn.build_cuda", "compile the CUDA kernels with nvcc into this installation"),
    "doctor": ("fastattn.doctor", "what this machine can do, and why it cannot do the rest"),
}
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand. Bad input ends with exit code 2 and one sentence (--debug adds the traceback)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="fastattn", description="Fused attention for fine-tuning frozen models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked_for = next((argument for argument in argv if not argument.startswith("-")), None)
    module = asked_parser = None
    for name, (path, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == asked_for:
            module, asked_parser = importlib.import_module(path), subparser
            module.add_arguments(subparser)
            subparser.add_argument(
                "--debug", action="store_true", default=False, help="show the traceback of an error"
            )
    if asked_parser is None or argv[0] != asked_for:
        parser.parse_args(argv)  # help, or an error
    # By itself, as only so may options stand between positional arguments: `predict DIR --json TEXT`.
    own = argv[argv.index(asked_for) + 1 :]
    arguments = asked_parser.parse_intermixed_args(own, argparse.Namespace(command=asked_for))
    try:
        return module.run(arguments, argv)
    except FastattnError as error:
        return _fail(arguments, error, str(error), BAD_INPUT)
    except KeyboardInterrupt as error:
        return _fail(arguments, error, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # `fastattn predict … | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _fail(arguments, error, f"{type(error).__name__}: {error} (--debug shows where)", FAILED)


def _fail(arguments: argparse.Namespace, error: BaseException, message: str, code: int) -> int:
    if arguments.debug:
        traceback.print_exception(error)
    print(f"fastattn {arguments.command}: {message}", file=sys.stderr)
    return code
