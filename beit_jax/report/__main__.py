"""Tables and curves of runs, side by side: on the terminal, and as one self-contained page.

python -m beit_jax.report runs/digits_dvae runs/digits_mim --output=report.html
"""

import sys
from pathlib import Path

from beit_jax import command_line
from beit_jax.errors import UserError
from beit_jax.report.page import page
from beit_jax.report.runs import read_run
from beit_jax.report.tables import make_tables, print_tables, verdicts


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser, _ = command_line.make_parser("beit_jax.report", *__doc__.split("\n", 1))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", metavar="FILE", help="also write a page, such as report.html")

    def command() -> int:
        args = parser.parse_args(argv)
        runs = [read_run(folder) for folder in args.runs]
        tables = make_tables(runs)
        print_tables([*tables, verdicts(runs)])
        if args.output:
            try:
                Path(args.output).write_text(page(runs, tables), encoding="utf-8")
            except OSError as error:
                raise UserError(f"--output={args.output}: {error.strerror}") from error
            print(f"wrote {args.output}")
        return 0

    return command_line.run("beit_jax.report", command, "nothing was written.")


if __name__ == "__main__":
    sys.exit(main())
