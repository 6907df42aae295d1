"""What the commands beside `main` share: flags, and answers to mistakes and interrupts."""

import argparse
import os
import re
import sys
from collections.abc import Callable

from absl import flags

from beit_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, a `UserError`."""

    def error(self, message: str):
        raise UserError(f"{message} (see `{self.prog} --help`)")


def make_parser(module: str, description: str, examples: str) -> tuple[Parser, dict]:
    """The parser of `python -m <module>`, and what its sub-commands' `add_parser` takes too."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": examples}
    return Parser(prog=f"python -m {module}", description=description, **layout), layout


def parse_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses flags with a `config` among them, and returns what is left of `argv`.

    Raises:
      UserError: one sentence, with the nearest neighbour of a misspelt key.
    """
    keys = [found[1] for found in map(_KEY.match, argv) if found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--config.{twice} is given more than once; give it once.")
    try:
        rest = values(argv)
        config = values["config"].value
        _ = config and config.task  # a file that cannot be loaded fails when read
    except (flags.Error, AttributeError, LookupError, TypeError, OSError, SyntaxError) as error:
        lines = str(error).replace("\\n", "\n").splitlines()
        # What a config file raises arrives with its traceback; the last line says what it is.
        sentence = " ".join(" ".join(lines[-1:] if "Traceback" in str(error) else lines).split())
        sentence = _misspelt(error, keys) or f"the command line cannot be used: {sentence}"
        raise UserError(sentence) from error
    return rest


_KEY = re.compile(r"--?(?:no)?config\.([^=]+)")


def _misspelt(error: Exception, keys: list[str]) -> str:
    """What ml_collections' error says of the one of `keys` that a config lacks; "" if nothing."""
    while error.args and isinstance(error.args[0], Exception):  # it wraps a KeyError
        error = error.args[0]
    found = re.match(r"'(\w+)'(?:\nDid you mean \"(\w+)\")?", str(*error.args[:1]))
    for parts in (key.split(".") for key in keys if found):
        if found[1] in parts:
            key = ".".join(parts[: parts.index(found[1]) + 1])
            advice = f"did you mean {found[2]}?" if found[2] else "configs/common.py has every key."
            return f"there is no config.{key}; {advice}"
    return ""


def run(module: str, command: Callable[[], int], interrupted: str) -> int:
    """Runs a command and returns its exit status; `interrupted` says what Ctrl-C leaves behind."""
    try:
        return command()
    except UserError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{module}: interrupted; {interrupted}", file=sys.stderr)
        return 130
