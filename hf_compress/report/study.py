"""`hf-compress study`: how much of the teacher's hidden states is worth how much (MUD, arXiv 2106.05691), on the user's own script.

    configs --> arms --> plan --> one teacher on disk --> a run for each arm and seed --> table, picture, verdict
                                  OUT/build               OUT/runs/ARM/seed-N             OUT/study.md, .json, .png

All arms read the one cache, so they differ in nothing but what they read of it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from hf_compress import __version__
from hf_compress.cache.hub import local_folder
from hf_compress.cache.hub_address import is_hub_address
from hf_compress.cache.manifest import MANIFEST_FILE, Manifest
from hf_compress.cache.price import readable
from hf_compress.cache.reader import StoredHow
from hf_compress.errors import ArgumentError, CacheError, TeacherError
from hf_compress.report.study_arms import NONE, PARTS, Arm, Choices, planned_arms
from hf_compress.report.study_command import Command
from hf_compress.report.study_models import Models, Stored, refuse_arms
from hf_compress.report.study_picture import draw_study
from hf_compress.report.study_runs import Outcome, Run, read_record, results_of, run_all
from hf_compress.report.study_table import Findings, Row, choose_metric, score_of, verdict, write_table

FAILED, STOPPED = 1, 130
PICTURE = "study.png"


@dataclass(frozen=True)
class Study:
    """What is asked.

    Attributes:
        command: of the user, checked.
        choices: which arms.
        seeds: each arm is trained with every one of them.
        metric: of the evaluation; None for its first.
        jobs: runs at once.
        table_only: train nothing; write table and picture of what is there.
        keep_models: leave the trained models in the runs' folders.
        student: a folder or name with the student's config; None for the script's --model_name_or_path.
        lines: more scores to compare with, by name.
        asked: the user's words, for the report.
    """

    command: Command
    choices: Choices
    seeds: tuple[int, ...]
    metric: str | None = None
    jobs: int = 1
    table_only: bool = False
    keep_models: bool = False
    student: str | None = None
    lines: Mapping[str, float] = field(default_factory=dict)
    asked: tuple[str, ...] = ()


def run_study(study: Study, console: Console | None = None) -> int:
    """Plan, build what is missing, train what is missing, and write the table.

    Args:
        study: what is asked.
        console: where plan and table are shown; by default the terminal.

    Returns:
        The exit code: 0; 1 if a run failed; 130 if it was stopped.

    Raises:
        CompressionError: of the kind that fits, before anything runs, if the study cannot be.
    """
    named = study.command.flags.teacher_cache_dir
    if named is not None and is_hub_address(named):
        study = replace(study, command=study.command.reading(local_folder(named)))
    return _Progress(study, console or Console()).run()


class _Progress:
    """A study on its way."""

    def __init__(self, study: Study, console: Console) -> None:
        self.study, self.command, self.console = study, study.command, console
        student = study.student or self.command.student
        if student is None:
            raise ArgumentError(
                "The study has to know how deep the student is, and there is no --model_name_or_path among the script's flags: add "
                "--study_student with a folder that has the student's config."
            )
        self.models = Models.read(self.command.flags, student, self._manifest())
        self.arms = planned_arms(study.choices, self.models.layers)
        if not self.models.teacher.shows_attention_scores and self._manifest() is None:
            ranked = [arm.name for arm in self.arms if arm.selection is not None and arm.selection.needs_importance]
            if ranked:
                raise TeacherError(
                    f"The teacher computes attention in a way of its own, so it cannot rank tokens as these arms ask: {', '.join(ranked)}. "
                    "Take --study_schemes left_first, and --hsk_length left_first for joint arms."
                )
        self.failed: list[Outcome] = []
        self.metric: str | None = None

    def _manifest(self) -> Manifest | None:
        return Manifest.load(self.command.cache_dir) if (self.command.cache_dir / MANIFEST_FILE).exists() else None

    def run(self) -> int:
        """All of it."""
        manifest, folder = self._manifest(), self.command.output_dir
        if folder.exists() and not folder.is_dir():
            raise ArgumentError(f"{folder} is a file; a study needs a folder. Name another: --output_dir DIR.")
        if manifest is not None:
            refuse_arms(self.command.cache_dir, manifest, self.arms, self.models.layers)
        elif self.study.table_only:
            raise CacheError(f"--table_only needs the teacher on disk that the runs read, and {self.command.cache_dir} holds none.")
        waiting = [run for run in self._runs(manifest) if not run.finished()]
        self._say_plan(waiting, manifest)
        code = 0
        if waiting and not self.study.table_only:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                if not self._build(manifest):
                    return FAILED
                manifest = Manifest.load(self.command.cache_dir)
                refuse_arms(self.command.cache_dir, manifest, self.arms, self.models.layers)
                self._train([run for run in self._runs(manifest) if not run.finished()])
            except KeyboardInterrupt:
                code = STOPPED
        left = [run for run in self._runs(self._manifest()) if not run.finished()]
        if (found := self._findings(len(left))) is not None:
            self._report(found)
        if code == STOPPED:
            self._say(f"Stopped; {self._count(left)} to be done. The same command goes on with them.")
        return code or (FAILED if self.failed else 0)

    # --- runs ---

    def _runs(self, manifest: Manifest | None) -> list[Run]:
        teacher = {} if manifest is None else {"teacher": manifest.teacher.weights}
        shared = {"study": list(self.command.of_arms), **teacher}
        return [
            Run(
                f"{arm.name}, seed {seed}",
                self.command.run_dir(arm, seed),
                self.command.arm(arm, seed),
                {**shared, "arm": arm.to_json(), "seed": seed},
            )
            for seed in self.study.seeds
            for arm in self.arms
        ]

    def _build(self, manifest: Manifest | None) -> bool:
        """Build the teacher on disk; of a finished one see that script, data and teacher go with it."""
        seed = self.study.seeds[0]
        layers = self.models.stored_layers(self.arms)
        told = self.command.build(layers, self.study.choices.rank_by, seed) if manifest is None else self.command.check(seed)
        run = Run("the teacher on disk", self.command.build_dir, told)
        if manifest is not None and (read_record(run.folder) or {}).get("command") == list(told):
            return True
        doing = "building" if manifest is None else "checking"
        self._say(f"{doing} the teacher on disk in {self.command.cache_dir} (log: {run.log})")
        started = time.monotonic()
        (outcome,) = run_all([run], jobs=1, results=False, begun=lambda run: None, ended=lambda outcome: None)
        if outcome.well and self._manifest() is not None:
            self._say(f"  {time.monotonic() - started:.0f} s, {readable(Manifest.load(self.command.cache_dir).bytes)}")
            return True
        trouble = outcome.trouble or f"there is no finished teacher on disk in {self.command.cache_dir} after it"
        self._say(f"{doing} the teacher on disk failed ({trouble}). The last lines of {run.log}:\n{outcome.last_lines()}")
        return False

    def _train(self, runs: Sequence[Run]) -> None:
        with tqdm(total=len(runs), desc="training", unit="run", smoothing=0.1, dynamic_ncols=True) as bar:
            started = time.monotonic()

            def begun(run: Run) -> None:
                bar.set_postfix_str(run.name)

            def ended(outcome: Outcome) -> None:
                bar.update()
                if not outcome.well:
                    self.failed.append(outcome)
                    bar.write(f"FAILED: {outcome.run.name} ({outcome.trouble}). The last lines of {outcome.run.log}:")
                    bar.write(outcome.last_lines())
                    return
                if self.metric is None:
                    self.metric = choose_metric(results_of(outcome.run.folder) or {}, self.study.metric)
                    left = (len(runs) - bar.n) * (time.monotonic() - started) / max(1, self.study.jobs)
                    bar.write(f"The first run took {_time(outcome.seconds)}; the other {len(runs) - bar.n} take about {_time(left)}.")
                score = score_of(results_of(outcome.run.folder), self.metric)
                shown = "no number" if score is None else f"{score:.4f}"
                bar.write(f"{outcome.run.name}: {self.metric} {shown}, {_time(outcome.seconds)}")

            run_all(
                runs,
                jobs=self.study.jobs,
                results=True,
                begun=begun,
                ended=ended,
                keep_models=self.study.keep_models,
            )

    # --- what was found ---

    def _findings(self, missing: int) -> Findings | None:
        """The rows of all arms that were trained in this folder with this command, those of earlier calls too."""
        arms = self._trained_arms()
        results = {(arm.name, seed): results_of(self.command.run_dir(arm, seed)) for arm in arms for seed in self._seeds_of(arm)}
        found = next((each for each in results.values() if each is not None), None)
        if found is None:
            self._say("No run is finished yet, so there is no table.")
            return None
        metric = choose_metric(found, self.study.metric)
        stored = Stored.read(self.command.cache_dir)
        rows = []
        for arm in arms:
            by_seed = {seed: score_of(results[arm.name, seed], metric) for seed in self._seeds_of(arm)}
            scores = {seed: score for seed, score in by_seed.items() if score is not None}
            if scores:
                rows.append(self._row(arm, stored, scores))
        if not rows:
            raise ArgumentError(f"--metric {metric}: it is not a number in any finished run.")
        failed = tuple(f"{outcome.run.name} ({outcome.trouble})" for outcome in self.failed)
        about = self._about(stored)
        return Findings(
            tuple(rows), metric, stored.score(metric), self.study.lines, about, stored.exact, failed, missing - len(self.failed)
        )

    def _row(self, arm: Arm, stored: Stored, scores: Mapping[int, float]) -> Row:
        chosen, layers = arm.selection, self.models.layers
        pairs = layers.pairs(chosen)
        paper = 0.0
        if chosen is not None:
            longest = self.command.max_length
            paper = len(pairs) / (layers.student + 1) * min(chosen.tokens or longest, longest) / longest * chosen.width
        share = stored.share(chosen, pairs, layers.student)
        return Row(arm, len(pairs), share, paper, stored.bytes_an_example(self.models, chosen), scores)

    def _trained_arms(self) -> tuple[Arm, ...]:
        """The planned arms, and others that this very command trained before."""
        arms = {arm.name: arm for arm in self.arms}
        planned = {name for arm in self.arms for name in (arm.name, *arm.also)}
        for record in map(read_record, sorted(path.parent for path in self.command.output_dir.glob("runs/*/seed-*/study_run.json"))):
            if record is not None and record.get("study") == list(self.command.of_arms) and record["arm"]["name"] not in planned:
                arms.setdefault(record["arm"]["name"], Arm.from_json(record["arm"]))
        return tuple(sorted(arms.values(), key=lambda arm: (PARTS.index(arm.part), arm.part == "ends" and arm.name != NONE)))

    def _seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The seeds of this study with which an arm is finished."""
        return tuple(seed for seed in self.study.seeds if read_record(self.command.run_dir(arm, seed)) is not None)

    def _about(self, stored: Stored) -> dict[str, Any]:
        manifest, layers = stored.manifest, self.models.layers
        return {
            "command": shlex.join(["hf-compress", "study", *self.study.asked]),
            "teacher": manifest.teacher.name,
            "teacher_weights": manifest.teacher.weights,
            "teacher_layers": layers.teacher,
            "student_layers": layers.student,
            "own_pairs": [list(pair) for pair in layers.own],
            "dtype": StoredHow.of(manifest).codec,
            "examples": manifest.examples,
            "tokens": manifest.tokens,
            "max_length": self.command.max_length,
            "seeds": list(self.study.seeds),
            "hf_compress_version": __version__,
        }

    def _report(self, found: Findings) -> None:
        folder = self.command.output_dir
        page, content = write_table(found, folder, PICTURE)
        draw_study(found, folder / PICTURE)
        for row in found.rows:
            spread = "" if row.spread is None else f" ± {found.factor * row.spread:.2f}"
            self._say(
                f"{row.arm.name:<28} {100 * row.share:>8.3g}%  {row.bytes:>12,.0f} bytes  {found.shown(row.mean)}{spread} "
                f"({_plural(len(row.scores), 'seed')})"
            )
        for line in verdict(found):
            self._say(line)
        self._say(f"Written: {page}, {content}, {folder / PICTURE}")

    # --- words ---

    def _say_plan(self, waiting: Sequence[Run], manifest: Manifest | None) -> None:
        total = len(self.arms) * len(self.study.seeds)
        self._say(f"{_plural(len(self.arms), 'arm')} x {_plural(len(self.study.seeds), 'seed')}: {_plural(total, 'run')}")
        for part in dict.fromkeys(arm.part for arm in self.arms):
            names = [" = ".join([arm.name, *arm.also]) for arm in self.arms if arm.part == part]
            self._say(f"  {part:<7} {', '.join(names)}")
        there = f"there, {manifest.examples:,} examples of {manifest.teacher.name}" if manifest is not None else "to be built"
        layers = ", ".join(map(str, sorted(self.models.stored_layers(self.arms))))
        self._say(f"teacher on disk: {self.command.cache_dir} ({there}; layers needed: {layers})")
        done = total - len(waiting)
        if done:
            self._say(f"finished already: {_plural(done, 'run')}")
        if waiting and not self.study.keep_models and not self.study.table_only:
            self._say("trained models are deleted when they are scored; --keep_models leaves them")

    def _count(self, left: Sequence[Run]) -> str:
        return f"{_plural(len(left), 'run')} {'is' if len(left) == 1 else 'are'} still"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
