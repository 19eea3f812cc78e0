"""What the command line takes: commands, their options, and the types of these."""

import argparse
from pathlib import Path
from typing import Any, Literal

EXAMPLES = """\
examples:
  mllm-msr demo --output demo_output                       the whole method on an embedded data set, in minutes
  mllm-msr run movielens_100k --data DIR                   the same on MovieLens-100k; `mllm-msr recipes` has others
own data, from tables to a ranking:
  mllm-msr init shop                                       look at the folder `shop`, write the recipe shop.yaml
  mllm-msr check shop.yaml                                 try it on a few users: does it work, what will it cost
  mllm-msr run shop.yaml                                   all stages, into runs/shop
  mllm-msr status runs/shop                                how far it is, what is stale, what comes next
  mllm-msr rank runs/shop --user ann                       rank the catalogue for one user
with a finished run:
  mllm-msr rank RUN --user u0003 --format json             the same for programs; or into a file by --output
  mllm-msr rank RUN --users all --output rankings          for all users; by all GPUs with --ray local
                                                           shares them among processes
  mllm-msr show demo_output user u0003                     what was read and written of one user, step by step
  mllm-msr show RUN page                                   try a run's model in the browser
  mllm-msr serve demo_output                               answer over HTTP, from events as they come
  mllm-msr publish demo_output --namespace org --dry-run   what would go to the Hub
stages, each alone on a run; what is finished is skipped, what was interrupted goes on:
  mllm-msr prepare movielens_100k --data DIR --output RUN
  mllm-msr summarize items RUN
  mllm-msr summarize users RUN
  mllm-msr vectors RUN
  mllm-msr train RUN
  mllm-msr head RUN
  mllm-msr evaluate RUN
  mllm-msr report RUN
evidence:
  mllm-msr evaluate RUN --baselines knn,tfidf,svd,sasrec,gru4rec   further variants on exactly the same candidates
  mllm-msr evaluate RUN --full-catalogue 100 --agreement 50        among all items; whether number formats agree
  mllm-msr evaluate RUN --model OTHER --fine-tune 100              cross-domain; without --fine-tune as it is
  mllm-msr study studies/ablations_demo                            what each part of the method is worth, on the demo
  mllm-msr compare RUN RUN                                 runs side by side
"""


def build_parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from")
    parser = argparse.ArgumentParser(
        prog="mllm-msr",
        description="Recommendation with multimodal LLMs: summarise items and users, fine-tune, rank, report, publish.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug],
    )
    parser.add_argument("--version", action=Version, help="print the version and those of the libraries beneath it")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, into: Any = commands) -> argparse.ArgumentParser:
        return into.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", parents=[debug])

    demo = command("demo", "run the whole method on the embedded data set")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="its run (default: demo_output)")
    how = "how the model reads user and candidate; late is what to serve (default: joint, as in the paper)"
    demo.add_argument("--interaction", choices=("joint", "late"), default="joint", help=how)
    demo.add_argument("--serve", action="store_true", help="then show it in the browser (needs the extra [demo])")
    demo.add_argument("--port", type=port, default=7860, help="of --serve (default: 7860)")

    init = command("init", "look at a folder of own tables and write the recipe for them")
    init.add_argument("folder", type=Path, nargs="?", default=Path(), help="of log, catalogue and images (default: .)")
    init.add_argument("--output", metavar="FILE", type=Path, help="the recipe (default: <folder's name>.yaml)")
    init.add_argument("--backbone", type=text_of, default="demo", help="model to fine-tune (Hub id, folder, or demo)")
    add_tables(init)

    for name, text in (
        ("run", "do every stage of a recipe, from raw data to report and Hub folder"),
        ("prepare", "read, clean and split raw data into ranking tasks"),
        ("check", "try a recipe on a few users: whether all of it works, and what each stage will cost"),
    ):
        sub = command(name, text)
        its = "recipe file, or the name of one of `mllm-msr recipes`; not needed for own tables"
        sub.add_argument("recipe", type=Path, nargs="?", help=its if name != "check" else f"{its}; or a run's folder")
        sub.add_argument("--data", metavar="DIR", help="folder of the raw data, or hf://datasets/OWNER/NAME")
        sub.add_argument("--output", type=Path, help="folder of the run (default: runs/<recipe's name>)")
        sub.add_argument("--limit-users", type=positive, help="keep a seeded sample of users, to be done sooner")
        sub.add_argument("--backbone", type=text_of, help="model to fine-tune (Hub id, folder, or demo)")
        if name == "check":
            sub.add_argument("--users", type=positive, default=20, help="on how many it is tried (default: 20)")
        add_data_options(sub)

    status = command("status", "say how far a run is, what is stale and why, and which command comes next")
    status.add_argument("run", type=Path, help="folder of the run")
    recipes = command("recipes", "list the recipes inside the package, or print one")
    recipes.add_argument("name", nargs="?", help="print this one, to be changed: mllm-msr recipes NAME > my.yaml")
    completion = command("completion", "print what completes commands and options in a shell ([completion])")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help='e.g. eval "$(mllm-msr completion bash)"')

    summarize = command("summarize", "write item summaries or user preferences")
    parts = summarize.add_subparsers(dest="part", required=True, metavar="items|users")
    stages = [
        command("items", "summarise each item's image and words", parts),
        command("users", "write preferences by history blocks", parts),
        vectors := command("vectors", "let a language model make a vector of each item, for the sequence head"),
        command("train", "fine-tune the recommender on the run's examples"),
        command("head", "train the sequence head over the item vectors, and what it is fused with"),
        evaluate := command("evaluate", "score the frozen tasks with every variant of the table, compute the metrics"),
        report := command("report", "write report.html and results.md"),
    ]
    for sub in stages:
        sub.add_argument("run", type=Path, help="folder of the run")
        if sub is not report:
            add_setting(sub, "a value of the run's recipe from now on, of the sections that the stage reads")
    for sub in (*stages[:3], evaluate, commands.choices["run"]):
        add_cluster(sub)
    own = "own vectors: Parquet, CSV or npz with item_id and vector for every item"
    vectors.add_argument("--vectors", metavar="FILE", type=text_of, help=own)
    further = "further variants on the same tasks, such as knn,sasrec; an unknown name lists all"
    evaluate.add_argument("--baselines", metavar="A,B", type=names, default=[], help=further)
    evaluate.add_argument(
        "--model", metavar="RUN|REPO", type=text_of, help="rank with the model of another run, or of the Hub"
    )
    tasks = "fine-tune it on so many of this run's training tasks first; without --model, the recipe's backbone"
    evaluate.add_argument("--fine-tune", metavar="N", type=positive, help=tasks)
    whole = "also rank the choices of N users (or all) among the whole catalogue"
    evaluate.add_argument("--full-catalogue", metavar="N|all", type=positive_or_all, help=whole)
    ways = "also score N tasks in other number formats and ways of computing, to see whether they agree"
    evaluate.add_argument("--agreement", metavar="N", type=positive, help=ways)

    study = command("study", "run one recipe under many settings; one table and plot of them all")
    study.add_argument("study", type=Path, help="study file, or the name of one of `mllm-msr recipes`")
    study.add_argument("--output", type=Path, help="folder of the study (default: runs/<study's name>)")
    study.add_argument("--data", metavar="DIR", help="folder of the raw data of every cell")
    study.add_argument("--only", metavar="CELL", action="append", default=[], help="run this cell; may be repeated")

    compare = command("compare", "put the results of several runs side by side")
    compare.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")

    rank = command("rank", "rank the catalogue, or some of it, for users of a run")
    rank.add_argument("run", type=Path, help="folder of a run with a trained model")
    who = rank.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", type=text_of, help="user id: the last preference, all unseen items as candidates")
    who.add_argument("--preference", type=text_of, help="a preference in words instead of a user")
    many = "many users, into files (resumable)"
    who.add_argument("--users", metavar="all|A,B", type=names, help=many)
    after = "items chosen, oldest first, of a user that the run need not know (ranked by the head)"
    who.add_argument("--history", metavar="A,B", type=names, help=after)
    ways = "the trained model's answer, the sequence head, or the fused score (default: fused where it is there)"
    rank.add_argument("--by", choices=("answer", "head", "fused"), help=ways)
    rank.add_argument("--items", type=names, metavar="A,B", help="candidate item ids (default: the catalogue)")
    new = "items that the run has never seen, ranked with its own: a table with item_id, title, text, image"
    rank.add_argument("--new-items", type=Path, metavar="FILE", help=new)
    rank.add_argument("--top-k", type=positive, default=10, help="how many to show (default: 10)")
    best = "of how many of a user's best candidates the fused score asks the answer; 0: none (default: 100)"
    rank.add_argument("--rerank", metavar="N", type=none_or_more, default=100, help=best)
    form = "a table to read (the default on a terminal), or csv, json or parquet"
    rank.add_argument("--format", choices=("table", "csv", "json", "parquet"), help=form)
    where = "write there, as the name ends: .csv, .json or .parquet; of --users a folder of Parquet files"
    rank.add_argument("--output", type=Path, metavar="FILE|DIR", help=where)
    index = command("index", "compute ahead what a model with interaction=late keeps of every item, for rank")
    index.add_argument("run", type=Path, help="folder of a run with a trained model")
    export = "in place of that, write the item vectors as an index of Faiss, for any model (needs [faiss])"
    index.add_argument("--export", type=Path, metavar="DIR", help=export)
    for sub in (rank, index):
        add_cluster(sub)
        sub.add_argument("--memory-gb", type=amount, help="kept of users and items (default: half of what is free)")

    serve = command("serve", "answer over HTTP: score, rerank, recommend, from events as they come ([serve])")
    source = "folder of a run with a trained model; or a released one, its folder or OWNER/NAME@REVISION on the Hub"
    serve.add_argument("source", metavar="RUN|REPO", type=text_of, help=source)
    its = "of a released model, folder or repository (default: the one that belongs to it)"
    serve.add_argument("--dataset", metavar="REPO", type=text_of, help=its)
    serve.add_argument("--host", default="127.0.0.1", type=text_of, help="to listen on (default: this machine only)")
    serve.add_argument("--port", type=port, default=8080, help="default: 8080; 0 is any that is free")
    serve.add_argument("--device", type=text_of, help="of the model, such as cpu or cuda:1 (default: an accelerator)")
    where = "SQLite file or database URL, of users and items (default: RUN/state.sqlite)"
    serve.add_argument("--state", metavar="FILE|URL", type=text_of, help=where)
    secret = "lines `read KEY` and `write KEY`; or MLLM_MSR_READ_KEYS and MLLM_MSR_WRITE_KEYS in the environment"
    serve.add_argument("--keys", metavar="FILE", type=Path, help=secret)
    serve.add_argument("--open-to-all", action="store_true", help="listen beyond this machine without any key")
    serve.add_argument("--image-urls", action="store_true", help="fetch images by URL, never from private addresses")
    further = "CSV or Parquet with item_id and columns that recommendations may be filtered by"
    serve.add_argument("--item-columns", metavar="FILE", type=Path, help=further)
    serve.add_argument("--deadline", type=amount, default=30.0, help="seconds until a request is given up (30)")
    serve.add_argument("--max-body-mb", type=amount, default=32.0, help="of a request (32)")
    serve.add_argument("--memory-gb", type=amount, help="kept of users and items (default: half of what is free)")
    graphs = "of torch.compile for small requests to a late model, such as reduce-overhead on a GPU (default: none)"
    serve.add_argument("--compile", metavar="MODE", type=text_of, help=graphs)
    serve.add_argument("--log-texts", action="store_true", help="log ids and what errors say, not only routes")

    publish = command("publish", "release a run on the Hub: model, data set, metric, demo Space")
    publish.add_argument("run", type=Path, help="folder of a run with a report")
    publish.add_argument("--namespace", required=True, type=text_of, help="user or organisation on the Hub")
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
    publish.add_argument("--tag", type=text_of, help="of the release (default: v and the version of mllm-msr)")
    publish.add_argument("--dry-run", action="store_true", help="show the files and cards; nothing leaves this machine")
    publish.add_argument("--without-images", action="store_true", help="embed no images in the data set")
    publish.add_argument("--anonymise", action="store_true", help="hash the demo's users too; real ones always are")

    show = command("show", "print one user's history, or open a run's model in the browser")
    show.add_argument("run", type=Path, help="folder of the run")
    what = show.add_subparsers(dest="part", required=True, metavar="user|page")
    user = command("user", "print a user's history with the preference after each history block", what)
    user.add_argument("id", type=text_of, help="user id")
    page = command("page", "try a run's model in the browser (needs the extra [demo])", what)
    page.add_argument("--port", type=port, default=7860, help="where to serve it (default: 7860)")
    return parser


def add_tables(parser: argparse.ArgumentParser) -> None:
    """Own tables: which they are, and what their columns are called."""
    own = parser.add_argument_group(
        "own tables (CSV, TSV, JSON lines, Parquet, or a data set hf://datasets/OWNER/NAME)"
    )
    own.add_argument("--interactions", metavar="FILE", type=text_of, help="log: user_id, item_id, timestamp")
    own.add_argument("--items", metavar="FILE", type=text_of, help="catalogue: item_id, title, text, image")
    own.add_argument("--images", metavar="DIR", type=text_of, help="folder of the image files")
    own.add_argument(
        "--column", metavar="OURS=YOURS", action="append", type=mapping, default=[], help="e.g. user_id=reviewer"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Own tables, and the data protocol; each overrides the recipe."""
    add_tables(parser)
    data = parser.add_argument_group("data protocol (docs/data.md)")
    data.add_argument("--protocol", choices=("strict", "paper", "global-cutoff"))
    data.add_argument("--negatives", metavar="N|all", type=positive_or_all, help="a target; all: rank among all items")
    data.add_argument("--negative-sampling", choices=("uniform", "popularity"))
    data.add_argument("--folds", type=int, metavar="K", help="protocol paper: test 1/K of the users, K runs test all")
    data.add_argument("--fold", type=int, metavar="k", help="which fold, 0 ... K-1")
    data.add_argument("--on-bad-rows", choices=("error", "skip"), help="stop at the first, or count and leave out")
    data.add_argument("--seed", type=int, help="of candidates, samples, training and evaluation")
    add_setting(data, "any other value of the recipe, e.g. data.k_core_users=7")


def add_cluster(parser: argparse.ArgumentParser) -> None:
    ray = "share the work on Ray ([ray]): local (all of this machine), auto (the cluster it is in) or HOST:PORT"
    parser.add_argument("--ray", metavar="ADDRESS", type=cluster_address, help=ray)
    share = "how many share the cluster's GPUs or, without any, its cores (default: one a GPU, or one a core)"
    parser.add_argument("--workers", metavar="N", type=positive, help=share)


def add_setting(parser: Any, text: str) -> None:
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", type=mapping, default=[], help=text)


class Version(argparse.Action):
    """Prints versions, which are looked up only then, and ends."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from importlib.metadata import version
        from platform import python_version

        beneath = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "polars"))
        print(f"mllm-msr {version('mllm-msr')} (Python {python_version()}, {beneath})")
        parser.exit()


# ---- types of arguments: what they refuse is wrong usage, and ends with status 2 -----------------------------------


def mapping(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def none_or_more(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive whole number")
    return int(text)


def positive_or_all(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else positive(text)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 (any that is free) to 65535")
    return int(text)


def cluster_address(text: str) -> str:
    host, _, number = text.rpartition(":")
    is_place = host and "/" not in host and number.isdecimal() and 0 < int(number) < 65536
    if text not in ("local", "auto") and not is_place:
        raise argparse.ArgumentTypeError(f"{text!r} is not local, auto or HOST:PORT")
    return text


def amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def text_of(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no valid text: give it in UTF-8") from None
    return text


def names(text: str) -> list[str]:
    return [text_of(name).strip() for name in text.split(",")]
