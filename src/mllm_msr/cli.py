"""The command line. Nothing heavy is imported before a command needs it, so ``mllm-msr --help`` answers at once."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

EXAMPLES = """\
examples:
  mllm-msr demo --output demo_output                       the whole method on an embedded data set, in minutes
  mllm-msr run recipes/movielens_100k.yaml --data DIR      the same on MovieLens-100k
  mllm-msr prepare --interactions log.csv --items items.csv --column user_id=reviewer   own tables, no recipe
  mllm-msr rank demo_output --user u0003 --top-k 10        rank the catalogue for one user
  mllm-msr rank RUN --users all --output rankings          for all users; `accelerate launch -m mllm_msr.cli rank ...`
                                                           shares them among processes
  mllm-msr show user u0003 demo_output                     what was read and written of one user, step by step
  mllm-msr publish demo_output --namespace org --dry-run   what would go to the Hub
stages, each alone on a run directory; what is finished is skipped, what was interrupted goes on:
  mllm-msr prepare recipes/movielens_100k.yaml --data DIR --output RUN
  mllm-msr summarize items RUN
  mllm-msr summarize users RUN
  mllm-msr train RUN
  mllm-msr evaluate RUN
  mllm-msr report RUN
evidence:
  mllm-msr evaluate RUN --baselines knn,tfidf,svd,sasrec,gru4rec   further rows on exactly the same candidates
  mllm-msr evaluate RUN --full-catalogue 100 --agreement 50        among all items; whether number formats agree
  mllm-msr evaluate RUN --model OTHER --fine-tune 100              cross-domain; without --fine-tune as it is
  mllm-msr study recipes/studies/ablations_demo.yaml               what each part of the method is worth, on the demo
  mllm-msr compare RUN RUN                                 runs side by side
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mllm-msr",
        description="Recommendation with multimodal LLMs: summarise items and users, fine-tune, rank, report, publish.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, into=commands) -> argparse.ArgumentParser:
        return into.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    demo = command("demo", "run the whole method on the embedded data set")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="run directory (default: demo_output)")
    demo.add_argument("--serve", action="store_true", help="then show it in the browser (needs the extra [demo])")
    demo.add_argument("--port", type=int, default=7860, help="of --serve (default: 7860)")

    for name, text in (
        ("run", "do every stage of a recipe, from raw data to report and Hub folder"),
        ("prepare", "read, clean and split raw data into ranking tasks"),
    ):
        sub = command(name, text)
        sub.add_argument("recipe", type=Path, nargs="?", help="recipe file, see recipes/; not needed for own tables")
        sub.add_argument("--data", metavar="DIR", help="folder of the raw data, or hf://datasets/OWNER/NAME")
        sub.add_argument("--output", type=Path, help="run directory (default: runs/<recipe's name>)")
        sub.add_argument("--limit-users", type=int, help="keep a seeded sample of users, to be done sooner")
        sub.add_argument("--backbone", help="model to fine-tune instead of the recipe's (Hub id, folder, or demo)")
        add_data_options(sub)

    summarize = command("summarize", "write item summaries or user preferences")
    parts = summarize.add_subparsers(dest="part", required=True, metavar="items|users")
    for name, text in (("items", "summarise each item's picture and words"), ("users", "write preferences by blocks")):
        command(name, text, parts).add_argument("run", type=Path, help="run directory")

    for name, text in (
        ("train", "fine-tune the recommender on the run's examples"),
        ("evaluate", "score the frozen tasks with every row of the table and compute the metrics"),
        ("report", "write report.html and results.md"),
    ):
        sub = command(name, text)
        sub.add_argument("run", type=Path, help="run directory")
        if name == "evaluate":
            known = "popularity, random, knn, tfidf, svd, sasrec, gru4rec"
            sub.add_argument(
                "--baselines", metavar="A,B", type=names, default=[], help=f"further rows on the same tasks, of {known}"
            )
            sub.add_argument("--model", metavar="RUN|REPO", help="rank with the model of another run, or of the Hub")
            some = "fine-tune it on so many of this run's training tasks first; without --model, the recipe's backbone"
            sub.add_argument("--fine-tune", metavar="N", type=positive, help=some)
            whole = "also rank the choices of N users (or all) among the whole catalogue"
            sub.add_argument("--full-catalogue", metavar="N|all", type=positive_or_all, help=whole)
            ways = "also score N tasks in other number formats and ways of computing, to see whether they agree"
            sub.add_argument("--agreement", metavar="N", type=positive, help=ways)

    study = command("study", "run one recipe under many settings; one table and plot of them all")
    study.add_argument("study", type=Path, help="study file, see recipes/studies/ablations_demo.yaml")
    study.add_argument("--output", type=Path, help="folder of the study (default: runs/<study's name>)")
    study.add_argument("--data", metavar="DIR", help="folder of the raw data of every cell")
    study.add_argument("--only", metavar="CELL", action="append", default=[], help="run this cell; may be repeated")

    compare = command("compare", "put the rows of several runs side by side")
    compare.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")

    rank = command("rank", "rank the catalogue, or some of it, for one user of a run")
    rank.add_argument("run", type=Path, help="run directory with a trained model")
    who = rank.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="user id: the last preference, all unseen items as candidates")
    who.add_argument("--preference", help="a preference in words instead of a user")
    who.add_argument(
        "--users", metavar="all|A,B", type=names, help="many users, into files (resumable; several processes share)"
    )
    rank.add_argument(
        "--items", type=names, help="comma-separated candidate item ids (default: all the user has not seen)"
    )
    rank.add_argument("--top-k", type=int, default=10, help="how many to show (default: 10)")
    rank.add_argument("--output", type=Path, metavar="DIR", help="where to write the rankings of --users")
    index = command("index", "compute ahead what a model with interaction=late keeps of every item, for rank")
    index.add_argument("run", type=Path, help="run directory with a trained model")
    for sub in (rank, index):
        sub.add_argument("--memory-gb", type=float, help="kept of users and items (default: half of what is free)")

    publish = command("publish", "release a run on the Hub: model, data set, metric, demo Space")
    publish.add_argument("run", type=Path, help="run directory with a report")
    publish.add_argument("--namespace", required=True, help="user or organisation on the Hub")
    for flag, text in (
        ("model", "model, processor, code and card"),
        ("datasets", "the derived data set"),
        ("metric", "the metric Space, for evaluate.load"),
        ("space", "the demo Space"),
    ):
        publish.add_argument(f"--{flag}", action="store_true", help=f"only what is named: {text}")
    publish.add_argument("--collection", action="store_true", help="also gather them in a collection")
    publish.add_argument("--public", action="store_true", help="for everyone to see, once all is there")
    publish.add_argument("--create-pr", action="store_true", help="propose pull requests instead of committing")
    publish.add_argument("--tag", help="of the release (default: v and the version of mllm-msr)")
    publish.add_argument("--dry-run", action="store_true", help="show the files and cards; nothing leaves this machine")
    publish.add_argument("--without-images", action="store_true", help="embed no pictures in the data set")
    publish.add_argument("--anonymise", action="store_true", help="hash drawn users too; real ones always are")

    show = command("show", "print a user's history with the preference after each block")
    user = command("user", "print one user's history", show.add_subparsers(dest="part", required=True, metavar="user"))
    user.add_argument("id", help="user id")
    user.add_argument("run", type=Path, nargs="?", default=Path("demo_output"), help="run directory (demo_output)")
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Own tables, and the data protocol; each overrides the recipe."""
    own = parser.add_argument_group(
        "own tables (CSV, TSV, JSON lines, Parquet, or a data set hf://datasets/OWNER/NAME)"
    )
    own.add_argument("--interactions", metavar="FILE", help="log: user_id, item_id, timestamp")
    own.add_argument("--items", metavar="FILE", help="catalogue: item_id, title, text, image")
    own.add_argument("--images", metavar="DIR", help="folder of the image files")
    own.add_argument(
        "--column", metavar="OURS=YOURS", action="append", type=mapping, default=[], help="e.g. user_id=reviewer"
    )
    data = parser.add_argument_group("data protocol (docs/data.md)")
    data.add_argument("--protocol", choices=("strict", "paper", "global-cutoff"))
    data.add_argument("--negatives", metavar="N|all", type=count_or_all, help="a held-out target; all: full catalogue")
    data.add_argument("--negative-sampling", choices=("uniform", "popularity"))
    data.add_argument("--folds", type=int, metavar="K", help="protocol paper: test 1/K of the users, K runs test all")
    data.add_argument("--fold", type=int, metavar="k", help="which fold, 0 ... K-1")
    data.add_argument("--on-bad-rows", choices=("error", "skip"), help="stop at the first, or count and leave out")
    data.add_argument("--seed", type=int, help="of candidates, samples, training and evaluation")
    further = "any other value of the recipe, e.g. data.k_core_users=7"
    data.add_argument("--set", metavar="KEY=VALUE", action="append", type=mapping, default=[], help=further)


def mapping(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_or_all(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else positive(text)


def count_or_all(text: str) -> int | Literal["all"]:
    return 0 if text == "0" else positive_or_all(text)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"mllm-msr: {message}")
    except KeyboardInterrupt:
        sys.exit("mllm-msr: interrupted; run the same command again to go on")


# ---- commands: from options to typed arguments; what is heavy is imported by the command that needs it --------------


def _open(options: argparse.Namespace) -> Any:
    from mllm_msr.opening import open_run

    return open_run(options.run)


def _open_recipe(options: argparse.Namespace) -> Any:
    from mllm_msr.opening import Overrides, open_recipe, parse_setting

    direct = "data interactions items images limit_users protocol negatives negative_sampling folds fold on_bad_rows"
    overrides = Overrides(
        **{name: getattr(options, name) for name in (*direct.split(), "seed", "backbone")},
        columns=dict(options.column),
        settings={key: parse_setting(key, text) for key, text in options.set},
    )
    return open_recipe(options.recipe, overrides, options.output, trains=options.command == "run")


def demo(options: argparse.Namespace) -> None:
    from mllm_msr.demo.main import demo
    from mllm_msr.stages import serve

    run = demo(options.output)
    if options.serve:
        serve(run, options.port)


def run(options: argparse.Namespace) -> None:
    from mllm_msr.stages import run_all

    run_all(_open_recipe(options))


def prepare(options: argparse.Namespace) -> None:
    from mllm_msr.stages import prepare

    prepare(_open_recipe(options))


def summarize(options: argparse.Namespace) -> None:
    from mllm_msr.stages import summarize_items, summarize_users

    (summarize_items if options.part == "items" else summarize_users)(_open(options))


def train(options: argparse.Namespace) -> None:
    from mllm_msr.stages import train

    train(_open(options))


def evaluate(options: argparse.Namespace) -> None:
    from mllm_msr.evaluation.evaluate import scorable, with_evaluation
    from mllm_msr.stages import evaluate
    from mllm_msr.transfer import with_model_of

    run = with_evaluation(_open(options), options.baselines, options.full_catalogue, options.agreement)
    if options.model or options.fine_tune:
        run = with_model_of(run, options.model, options.fine_tune)
    evaluate(run, scorable(run) if options.baselines else None)


def report(options: argparse.Namespace) -> None:
    from mllm_msr.stages import report

    report(_open(options))


def study(options: argparse.Namespace) -> None:
    from mllm_msr.study import run_study

    run_study(options.study, options.output or Path("runs") / options.study.stem, options.only, options.data)


def compare(options: argparse.Namespace) -> None:
    from mllm_msr.hub_cards.results_page import compare

    print(compare(options.runs))


def rank(options: argparse.Namespace) -> None:
    from mllm_msr import rank

    run = _open(options)
    how = {"items": options.items, "top_k": options.top_k, "memory_gb": options.memory_gb}
    if options.users:
        if not options.output:
            raise ValueError("name a folder for the rankings: --output DIR")
        rank.rank_users(run, None if options.users == ["all"] else options.users, options.output, **how)
    elif options.user:
        rank.rank_user(run, options.user, **how)
    else:
        rank.rank_preference(run, options.preference, **how)


def index(options: argparse.Namespace) -> None:
    from mllm_msr.rank import index

    index(_open(options), options.memory_gb)


def publish(options: argparse.Namespace) -> None:
    from mllm_msr.stages import Release, publish

    parts = {"model": "model", "datasets": "dataset", "metric": "metric", "space": "space"}
    release = Release(
        options.namespace,
        parts=tuple(part for flag, part in parts.items() if getattr(options, flag)),
        collection=options.collection,
        public=options.public,
        create_pr=options.create_pr,
        tag=options.tag,
        dry_run=options.dry_run,
        images=not options.without_images,
        anonymise=options.anonymise,
    )
    publish(_open(options), release)


def show(options: argparse.Namespace) -> None:
    from mllm_msr.show import show_user

    show_user(_open(options), options.id)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    command.__name__: command
    for command in (
        demo, run, prepare, summarize, train, evaluate, report, study, compare, rank, index, publish, show,
    )
}  # fmt: skip


if __name__ == "__main__":
    main()
