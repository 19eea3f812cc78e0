"""The command line. Nothing heavy is imported before a command needs it, so ``mllm-msr --help`` answers at once."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_msr.parser import build_parser
from mllm_msr.records.mistakes import in_words

if TYPE_CHECKING:
    from mllm_msr.opening import Overrides
    from mllm_msr.records.cluster import Cluster
    from mllm_msr.records.run import RunFolder


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if problem := wrong_usage(options):
        parser.error(problem)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # titles may have what the terminal has not
    try:
        do(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("mllm-msr: interrupted; run the same command again to go on", file=sys.stderr)
        exec("")  # under `python -m`, an interrupt inside an exec'd text would end the process by a signal of its own
        sys.exit(130)
    except Exception as error:
        if getattr(options, "debug", False):
            raise
        sys.exit(f"mllm-msr: {in_words(error, 'run again with --debug')}")


def do(options: argparse.Namespace) -> None:
    """The command; one that shares its work belongs to a cluster meanwhile."""
    if cluster := cluster_of(options):
        from mllm_msr.processing.open_workers import joined

        with joined(cluster):
            COMMANDS[options.command](options)
    else:
        COMMANDS[options.command](options)


def wrong_usage(options: argparse.Namespace) -> str | None:
    """What no single argument shows: options that need each other."""
    if options.command in ("run", "prepare", "check") and not (options.recipe or options.interactions):
        return "give a recipe file, or own tables by --interactions (and --items)"
    if options.command in ("run", "check") and not (options.recipe or options.backbone):
        return "without a recipe, say which model to fine-tune: --backbone with a Hub id or a folder"
    if options.command == "compare" and len(options.runs) < 2:
        return "name two runs or more to compare"
    if getattr(options, "workers", None) and not options.ray:
        return "--workers are those of a cluster: say which one by --ray"
    if options.command == "rank" and options.ray and not options.users:
        return "--ray shares the ranking of many users: name them by --users"
    if options.command == "index" and options.ray and options.export:
        return "--export is written by this process alone: leave --ray out"
    if options.command == "rank" and options.users and not (options.output or options.format):
        return "name a folder or a file for the rankings of --users: --output DIR, or FILE.csv"
    return None


def cluster_of(options: argparse.Namespace) -> "Cluster | None":
    """Whose workers share the work; None: this process alone."""
    from mllm_msr.records.cluster import Cluster

    address = getattr(options, "ray", None)
    return Cluster(address, options.workers) if address else None


def on_cluster(run: "RunFolder", options: argparse.Namespace) -> "RunFolder":
    """The run, its map-like work shared as the options say."""
    return replace(run, cluster=cluster_of(options))


def existing_run(options: argparse.Namespace, stage: str | None = None) -> "RunFolder":
    from mllm_msr.opening import open_run, parse_setting

    settings = {key: parse_setting(key, text) for key, text in getattr(options, "set", ())}
    if getattr(options, "vectors", None):
        settings["vectors.file"] = str(Path(options.vectors).resolve())
    return open_run(options.run, stage, settings)


def overrides(options: argparse.Namespace) -> "Overrides":
    from mllm_msr.opening import Overrides, parse_setting

    direct = "data interactions items images limit_users protocol negatives negative_sampling folds fold on_bad_rows"
    return Overrides(
        **{name: getattr(options, name) for name in (*direct.split(), "seed", "backbone")},
        columns=dict(options.column),
        settings={key: parse_setting(key, text) for key, text in options.set},
    )


def recipe_run(options: argparse.Namespace) -> "RunFolder":
    from mllm_msr.opening import open_recipe

    return open_recipe(options.recipe, overrides(options), options.output)


def init(options: argparse.Namespace) -> None:
    from mllm_msr.new_recipe import InitOptions, init

    names = ("folder", "output", "interactions", "items", "images", "backbone")
    init(InitOptions(**{name: getattr(options, name) for name in names}, columns=dict(options.column)))


def check(options: argparse.Namespace) -> None:
    from mllm_msr.check import check
    from mllm_msr.opening import read_recipe

    recipe, place, run = read_recipe(options.recipe, overrides(options), options.output)
    check(recipe, place, run, options.users)
    print(f"next: mllm-msr status {shlex.quote(str(run.path))}" if run else f"next: {run_command(options)}")


def run_command(options: argparse.Namespace) -> str:
    """The command ``run`` with what ``check`` was given, but for its own option."""
    given = sys.argv[2:] if sys.argv[1:2] == ["check"] else [str(options.recipe)]
    own = {place + step for place, word in enumerate(given) if word == "--users" for step in (0, 1)}
    kept = [word for place, word in enumerate(given) if place not in own and not word.startswith("--users=")]
    return shlex.join(["mllm-msr", "run", *kept])


def status(options: argparse.Namespace) -> None:
    from mllm_msr.status import status

    print(status(existing_run(options)))


def recipes(options: argparse.Namespace) -> None:
    from mllm_msr.records.recipe import packaged_recipes, recipe_file

    if options.name:
        print(recipe_file(Path(options.name)).read_text(encoding="utf-8"), end="")
        return
    for name, path in packaged_recipes().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        print(f"{name:34}{first.partition(': mllm-msr')[0]}")


def completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ValueError("shtab is not installed: `pip install 'mllm-msr[completion]'`") from error
    print(shtab.complete(with_files(build_parser(), shtab.FILE), options.shell))


def demo(options: argparse.Namespace) -> None:
    from mllm_msr.demo.main import demo
    from mllm_msr.stages import check_serving, serve

    if options.serve:
        check_serving(options.port)
    run = demo(options.output, options.interaction)
    if options.serve:
        serve(run, options.port)


def run(options: argparse.Namespace) -> None:
    from mllm_msr.check import say_the_whole
    from mllm_msr.stages import print_next, run_all

    run = on_cluster(recipe_run(options), options)
    run_all(run)
    if run.recipe.data.limit_users:
        say_the_whole(run)
    print_next(run)


def stage(options: argparse.Namespace) -> None:
    from mllm_msr.stages import FUNCTIONS, print_next

    name = f"summarize {options.part}" if options.command == "summarize" else options.command
    run = recipe_run(options) if name == "prepare" else existing_run(options, name)
    FUNCTIONS[name](on_cluster(run, options))
    print_next(run)


def evaluate(options: argparse.Namespace) -> None:
    from mllm_msr.evaluation.evaluate import scorable, with_evaluation
    from mllm_msr.stages import evaluate, print_next
    from mllm_msr.transfer import with_model_of

    run = existing_run(options, "evaluate")
    run = with_evaluation(run, options.baselines, options.full_catalogue, options.agreement)
    if options.model or options.fine_tune:
        run = with_model_of(run, options.model, options.fine_tune)
    run = on_cluster(run, options)
    evaluate(run, scorable(run) if options.baselines else None)
    print_next(run)


def study(options: argparse.Namespace) -> None:
    from mllm_msr.records.recipe import recipe_file
    from mllm_msr.study import run_study

    run_study(
        recipe_file(options.study), options.output or Path("runs") / options.study.stem, options.only, options.data
    )


def compare(options: argparse.Namespace) -> None:
    from mllm_msr.hub_cards.results_page import compare
    from mllm_msr.records.run import RunFolder

    runs = [RunFolder.open(path) for path in options.runs]
    for run in runs:
        run.require("evaluate")
    print(compare(runs))


def rank(options: argparse.Namespace) -> None:
    from mllm_msr import rank
    from mllm_msr.rankings import FORMATS, format_of, say

    run = on_cluster(existing_run(options), options)
    new = None if options.new_items is None else rank.new_items(run, options.new_items)
    how = rank.Ranking(options.items, options.by, options.top_k, options.memory_gb, options.rerank, new)
    users = None if options.users == ["all"] else options.users
    if options.users and options.output and not options.format and options.output.suffix not in FORMATS:
        rank.rank_users(run, users, options.output, how)
        return
    format_of(options.output, options.format)  # or an error, before anything is computed
    if options.users:
        frame = rank.rank_some(run, users, how)
    elif options.user:
        frame = rank.rank_user(run, options.user, how)
    elif options.history:
        frame = rank.rank_history(run, options.history, how)
    else:
        frame = rank.rank_preference(run, options.preference, how)
    say(frame, options.output, options.format, rank.latest(run, how, options.user, options.history))


def index(options: argparse.Namespace) -> None:
    run = existing_run(options)
    if options.export:
        from mllm_msr.data.vector_export import export_index

        print(f"{export_index(run, options.export)} item vectors in {options.export}")
        return
    from mllm_msr.rank import index

    index(on_cluster(run, options), options.memory_gb)


def serve(options: argparse.Namespace) -> None:
    from mllm_msr.serving.main import ServeOptions, serve

    serve(ServeOptions(**{name: value for name, value in vars(options).items() if name not in ("command", "debug")}))


def publish(options: argparse.Namespace) -> None:
    from importlib.metadata import version

    from mllm_msr.hub_cards.release import Contents, Part, PublishOptions
    from mllm_msr.stages import publish

    parts: dict[str, Part] = {"model": "model", "datasets": "dataset", "metric": "metric", "space": "space"}
    release = PublishOptions(
        options.namespace,
        tag=options.tag or f"v{version('mllm-msr')}",
        parts=tuple(part for flag, part in parts.items() if getattr(options, flag)),
        contents=Contents(images=not options.without_images, anonymise=options.anonymise),
        dry_run=options.dry_run,
        collection=options.collection,
        public=options.public,
        create_pr=options.create_pr,
    )
    publish(existing_run(options), release)


def show(options: argparse.Namespace) -> None:
    from mllm_msr.show import show_user
    from mllm_msr.stages import serve

    if options.part == "user":
        show_user(existing_run(options), options.id)
    else:
        serve(existing_run(options), options.port)


def with_files(parser: argparse.ArgumentParser, complete: Any) -> argparse.ArgumentParser:
    """The parser with every path completed by the files that there are."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                with_files(sub, complete)
        elif action.type is Path:
            vars(action)["complete"] = complete  # where shtab looks for it
    return parser


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": demo,
    "init": init,
    "check": check,
    "run": run,
    "status": status,
    "recipes": recipes,
    "completion": completion,
    "prepare": stage,
    "summarize": stage,
    "vectors": stage,
    "train": stage,
    "head": stage,
    "evaluate": evaluate,
    "report": stage,
    "study": study,
    "compare": compare,
    "rank": rank,
    "index": index,
    "serve": serve,
    "publish": publish,
    "show": show,
}


if __name__ == "__main__":
    main()
