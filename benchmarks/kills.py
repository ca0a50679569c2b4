"""Whether a killed command, run again, comes to the same result bit for bit, as CSV and as Markdown.

python -m benchmarks.kills --count 30

Fit, export and predict of a small learned detector run undisturbed once. Then they are killed (SIGKILL, their data
workers, too), each time at a random moment of another of their stages, and run again: a fit from its last checkpoint,
where there is one, with the features that it had cached. After the kill, what the command is to write is not there, or
the old file, or whole; in the end it is the undisturbed command's.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from pytorch_lightning import Callback
from torch import Tensor

import patchad
from benchmarks.products import PLACE, append, commit
from patchad import PatchadError
from patchad.checkpoint import read_checkpoint
from patchad.data.synthetic import write_synthetic
from patchad.folders import images_below

STAGES = Path("stages")
"""Where a command says what it does, in its current folder."""
PART = f".{'?' * 32}.part"
"""What a file is called while it is written."""
OLD = b"what was there before"
ENDED = "ended"
CHECKPOINT = Path("runs/run/checkpoints/last.ckpt")
RUN = ("--trainer.logger.version=run", "--trainer.accelerator=cpu", "--trainer.callbacks+=benchmarks.kills.Stages")
FIT = (
    "--config=learned",
    "--trainer.max_epochs=6",
    "--trainer.check_val_every_n_epoch=2",
    "--data.image_size=96",
    "--data.metric_size=96",
    "--data.batch_size=2",
    "--data.num_workers=2",
    "--data.pyramids_per_image=32",
    "--model.bank.max_vectors=500",
    "--model.learning.clusters=10",
)


class Command(NamedTuple):
    """One verb of the command line, which runs in a current folder of its own.

    Attributes:
        verb: such as fit.
        options: of it.
        target: the file that it writes, from its current folder.
        read: what is to be equal in that file.
    """

    verb: str
    options: tuple[str, ...]
    target: Path
    read: Callable[[Path], Mapping[str, Tensor]]


class Moment(NamedTuple):
    """When a stage begins; of a kill, how long after that stage begins, for which time."""

    stage: str
    seconds: float
    occurrence: int = 0


class Row(NamedTuple):
    """One kill.

    Attributes:
        date: of the kill.
        commit: of the code.
        machine: its processor and cores.
        number: of the kill.
        command: that was killed.
        stage: that it was in; `other` is what comes before the first one, and all of an export but its writing.
        seconds: from the start of the command.
        left: the file that it writes, and others, right after the kill.
        result: of the second run.
    """

    date: str
    commit: str
    machine: str
    number: int
    command: str
    stage: str
    seconds: float
    left: str
    result: str

    def markdown(self) -> str:
        """Its line of the table."""
        cells = (self.number, self.command, self.stage, f"{self.seconds:.2f}", self.left, self.result)
        return f"| {' | '.join(map(str, cells))} |"


class Stages(Callback):
    """Writes down each stage of a command when it begins."""

    stage = ""

    def begin(self, stage: str) -> None:
        """Adds a line, unless the stage goes on."""
        if stage != self.stage:
            self.stage = stage
            with STAGES.open("a") as file:
                print(stage, file=file)

    def on_fit_start(self, *_: object) -> None:
        """Features are cached and measured."""
        self.begin("caching")

    def on_train_epoch_start(self, *_: object) -> None:
        """Pseudo-labels and steps."""
        self.begin("training")

    def on_validation_start(self, *_: object) -> None:
        """The banks come first."""
        self.begin("filling the bank")

    def on_validation_batch_start(self, *_: object) -> None:
        """Labelled images are scored."""
        self.begin("validating")

    def on_train_end(self, *_: object) -> None:
        """All is written."""
        self.begin("ending")

    def on_predict_batch_start(self, *_: object) -> None:
        """Images are scored, and their maps written."""
        self.begin("predicting")

    def on_predict_epoch_end(self, *_: object) -> None:
        """All scores are written."""
        self.begin("ending")


def main(count: int = 30, seed: int = 0, folder: Path = Path("runs/kills"), output: Path = PLACE / "kills.csv") -> None:
    """Kills, and prints the table.

    Args:
        count: how many kills.
        seed: of their moments.
        folder: where the commands run; whatever it holds is deleted.
        output: the CSV that the rows are added to.

    Raises:
        SystemExit: with 1 if a result differs.
    """
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_synthetic(folder / "product", train=12, test_normal=4, test_defective=7, size=96)
    timelines = {command: run(command, folder / command.verb) for command in commands(folder)}
    for command, (*_, end) in timelines.items():
        print(f"{command.verb}: {end.seconds:.1f} s undisturbed")
    print("\n| kill | command | stage | second | left | result |", "|---" * 6 + "|", sep="\n", flush=True)
    rng, rows = np.random.default_rng(seed), list[Row]()
    stages = [(command, stage) for command, moments in timelines.items() for stage in distinct(moments)]
    for number, (command, stage) in zip(range(1, count + 1), cycle(stages), strict=False):
        rows.append(killed(number, command, random_moments(timelines[command], stage, rng), folder))
        append(output, rows[-1])
        print(rows[-1].markdown(), flush=True)
    differing = sum(row.result != "equal" for row in rows)
    print(f"\n{differing} of {len(rows)} differ")
    sys.exit(differing > 0)


def commands(folder: Path) -> list[Command]:
    """A fit, and an export and a prediction from the checkpoint of the undisturbed one."""
    product = folder / "product"
    fitted = f"--ckpt_path={folder / 'fit' / CHECKPOINT}"
    predict = (*RUN, fitted, f"--data.root={product / 'test'}", "--data.batch_size=1")
    return [
        Command("fit", (*RUN, *FIT, f"--data.root={product}"), CHECKPOINT, tensors),
        Command("export", (*RUN, fitted), Path("model.patchad"), partial(scores, images_below(product / "test")[::4])),
        Command("predict", predict, Path("runs/run/predictions/scores.csv"), content),
    ]


def tensors(path: Path) -> dict[str, Tensor]:
    """The state of the detector in a checkpoint."""
    return read_checkpoint(path)["state_dict"]


def scores(images: list[Path], path: Path) -> dict[str, Tensor]:
    """Scores and maps of an exported file."""
    found = patchad.load(path).score(images)
    maps = {f"map {number}": torch.from_numpy(one.map) for number, one in enumerate(found)}
    return {**maps, "scores": torch.tensor([one.score for one in found], dtype=torch.float64)}


def content(path: Path) -> dict[str, Tensor]:
    """The bytes of a file."""
    return {"content": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}


def distinct(moments: Sequence[Moment]) -> list[str]:
    """The stages of a command, each once."""
    return list(dict.fromkeys(moment.stage for moment in moments[:-1]))


def random_moments(moments: Sequence[Moment], stage: str, rng: np.random.Generator) -> Iterator[Moment]:
    """Random moments of a stage, however often it comes."""
    spans = [(start.seconds, end.seconds) for start, end in pairwise(moments) if start.stage == stage]
    while True:
        occurrence = int(rng.integers(len(spans)))
        start, end = spans[occurrence]
        yield Moment(stage, rng.uniform(0, end - start), occurrence)


def killed(number: int, command: Command, fatal_moments: Iterable[Moment], folder: Path) -> Row:
    """Kills a command, runs it again, and compares."""
    place = folder / f"kill-{number}"
    expected = command.read(folder / command.verb / command.target)
    end = kill(command, place, fatal_moments, over_old=command.verb != "fit" and number % 2 == 0)
    others = f"{len(list(place.rglob('*.npy')))} arrays, {len(list(place.rglob('.*.part')))} temporary"
    try:
        left = found(command, place / command.target, expected)
        run(again(command, place), place)
        result = "equal" if same(command.read(place / command.target), expected) else "differs"
    except (PatchadError, subprocess.CalledProcessError) as error:
        left, result = "damaged", str(error)
    about = (str(date.today()), commit(), machine(), number)
    return Row(*about, command.verb, end.stage, end.seconds, f"{left}, {others}", result)


def kill(command: Command, place: Path, fatal_moments: Iterable[Moment], over_old: bool) -> Moment:
    """The moment at which a command died; it may find an old file."""
    target = place / command.target
    for fatal in fatal_moments:
        shutil.rmtree(place, ignore_errors=True)
        if over_old:
            target.parent.mkdir(parents=True)
            target.write_bytes(OLD)
        *_, end = run(command, place, fatal)
        if end.stage != ENDED:  # else it was faster than undisturbed
            return end
    raise AssertionError("there is always another moment")


def found(command: Command, target: Path, expected: Mapping[str, Tensor]) -> str:
    """What a kill left of the file that a command writes.

    Raises:
        PatchadError: if it is neither the old file nor whole.
    """
    if not target.is_file():
        return "nothing"
    if target.read_bytes() == OLD:
        return "the old file"
    if command.verb == "fit":
        return f"checkpoint of epoch {read_checkpoint(target)['epoch']}"
    if same(command.read(target), expected):
        return "the new file"
    raise PatchadError(f"{target} is damaged")


def again(command: Command, place: Path) -> Command:
    """The same command; a fit goes on where there is a checkpoint."""
    goes_on = command.verb == "fit" and (place / command.target).is_file()
    return command._replace(options=(*command.options, *([f"--ckpt_path={command.target}"] if goes_on else [])))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are equal."""
    return one.keys() == other.keys() and all(torch.equal(values, other[name]) for name, values in one.items())


def run(command: Command, place: Path, fatal: Moment | None = None) -> list[Moment]:
    """When each stage of a command began, and at last the end or the moment of the kill.

    Args:
        command: to run.
        place: its current folder.
        fatal: when it is killed, if it comes so far.

    Raises:
        subprocess.CalledProcessError: if it fails by itself.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / STAGES).unlink(missing_ok=True)
    start, now, moments = time.perf_counter(), 0.0, [Moment("other", 0.0)]
    process = started(command, place)
    while process.poll() is None:
        now, stage = time.perf_counter() - start, current_stage(command, place)
        if stage != moments[-1].stage:
            moments.append(Moment(stage, now))
        if fatal and is_due(fatal, moments, now):
            os.killpg(process.pid, signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                return [*moments, Moment(current_stage(command, place), now)]
        time.sleep(1e-4)  # a file of a few MB is written in milliseconds
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command.verb)
    return [*moments, Moment(ENDED, now)]


def started(command: Command, place: Path) -> subprocess.Popen:
    """Its process, which leads a group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PLACE.parent)}
    arguments = [sys.executable, "-m", "patchad", command.verb, *command.options]
    with (place / "output.txt").open("a") as output:
        return subprocess.Popen(
            arguments, cwd=place, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def current_stage(command: Command, place: Path) -> str:
    """What a command does, as its files tell."""
    if any((place / command.target).parent.glob(PART)):
        return f"writing {command.target.name}"
    begun = (place / STAGES).read_text().splitlines() if (place / STAGES).is_file() else []
    return begun[-1] if begun else "other"


def is_due(fatal: Moment, moments: list[Moment], now: float) -> bool:
    """Whether the stage has begun as often, and long enough ago."""
    starts = [moment.seconds for moment in moments if moment.stage == fatal.stage]
    return len(starts) > fatal.occurrence and now >= starts[fatal.occurrence] + fatal.seconds


def machine() -> str:
    """Its processor and cores."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0]}, {len(names)} cores"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
