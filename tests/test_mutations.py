"""The mutation gate: one wrong line each, and a named test that passed before must fail by assertion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# name: (file, the right line, the wrong one, the test that must notice)
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "mask": (
        "losses/reduction.py",
        "difference = (student - teacher).masked_fill_(~mask[..., None], 0.0)",
        "difference = (student - teacher).nan_to_num()",
        "tests/losses/test_hidden_states.py::test_plain_loop_and_blind_to_padding",
    ),
    "attention mask": (
        "losses/reduction.py",
        "visible = real[:, None, :] & real[:, :, None]",
        "visible = torch.ones_like(real)[:, None, :] & real[:, :, None]",
        "tests/losses/test_attention_scores.py::test_plain_loop_and_blind_to_padding",
    ),
    "relation heads": (
        "losses/relations.py",
        "return (vectors / math.sqrt(vectors.shape[-1])) @",
        "return vectors @",
        "tests/losses/test_relations.py::test_plain_loop_and_blind_to_padding",
    ),
    "captured values": (
        "capture.py",
        "zip(VECTOR_KINDS, (query, key, value), strict=True)",
        "zip(VECTOR_KINDS, (query, value, key), strict=True)",
        "tests/test_capture.py::test_a_berts_values_are_those_of_its_value_layer",
    ),
    "combined layers": (
        "losses/combined_layers.py",
        "joint.chunk(len(group), dim=-1), group, strict=True)",
        "joint.chunk(len(group), dim=-1), reversed(group), strict=True)",
        "tests/losses/test_combined_layers.py::test_plain_loop_and_blind_to_padding",
    ),
    "principal basis": (
        "students/pca_basis.py",
        "principal @ _last_to_ones(hidden_size).to(principal)",
        "principal",
        "tests/students/test_warm_start.py::test_at_full_width_and_depth_the_student_is_the_teacher",
    ),
    "narrow heads": (
        "students/warm_layer.py",
        "scale = (size / their_size) ** 0.25",
        "scale = 1.0",
        "tests/students/test_warm_layer.py::test_narrow_heads_keep_the_scores_and_what_is_written",
    ),
    "T squared": (
        "losses/logits.py",
        "log_target=True).sum(-1) * self.temperature**2",
        "log_target=True).sum(-1)",
        "tests/losses/test_logits.py::test_kl_by_hand",
    ),
    "teachers' shares": (
        "given_teachers.py",
        "replace(loss.times(each.share), teacher=each.number)",
        "replace(loss, teacher=each.number)",
        "tests/test_several_teachers.py::test_the_gradient_is_the_weighted_sum_of_each_teachers_own",
    ),
    "frozen below": (
        "progressive.py",
        "for layer in range(first, last + 1)",
        "for layer in range(1, last + 1)",
        "tests/test_progressive.py::test_a_plain_loop",
    ),
    "falling weight": (
        "losses/loss.py",
        "(self.final_weight - self.weight) * progress",
        "(self.final_weight - self.weight) * progress**2",
        "tests/test_final_weight.py::test_the_steps_are_those_of_a_plain_loop",
    ),
    "layer map": (
        "layers/layer_map.py",
        "(i, round(i * teacher_layers / student_layers)) for i",
        "(i, round(i * teacher_layers / student_layers) - 1) for i",
        "tests/losses/test_hidden_states.py::test_the_default_map_is_uniform_and_layers_add_up",
    ),
    "layers that are due": (
        "layers/schedule.py",
        'epochs // asked["every_n_epochs"] - len(each.dropped)',
        'epochs // asked["every_n_epochs"]',
        "tests/layers/test_schedule.py::test_when_layers_go",
    ),
    "moments of dropped layers": (
        "gradual_drop.py",
        'group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in left_out]',
        'group["params"][:] = list(group["params"])',
        "tests/test_gradual_drop.py::test_weights_moments_and_learning_rate_go_on[iterative]",
    ),
    "captured layer": (
        "capture.py",
        "output[0] if isinstance(output, tuple) else output)",
        "args[0])",
        "tests/test_capture.py::test_hidden_states_are_those_of_transformers[bert]",
    ),
    "counts": (
        "distillation.py",
        "total = total + torch.stack([read.count(unit) for unit in self.units]).to(device)",
        "total = torch.stack([read.count(unit) for unit in self.units]).to(device)",
        "tests/test_distill_trainer.py::test_accumulated_micro_batches_give_the_gradient_of_one_batch",
    ),
    "teacher.eval()": (
        "teacher.py",
        "        self.model.eval()  # whoever holds the model may have called train()",
        "        self.model.train()",
        "tests/test_distill_trainer.py::test_dropout_of_the_teacher_is_off",
    ),
    "projection saving": (
        "projections.py",
        "setattr(student, IGNORED, ignored | {",
        "setattr(student, IGNORED, ignored & {",
        "tests/test_distill_trainer.py::test_the_saved_student_is_a_plain_model_and_projections_lie_beside",
    ),
    "projection handed on": (
        "projections.py",
        "        projections._start_from(loaded_from(student), new)",
        "        projections._start_from(None, new)",
        "tests/test_projections_travel.py::test_the_next_stage_starts_from_them",
    ),
    "pooler nobody trained": (
        "teacher.py",
        "        model.pooler = None  # type: ignore[assignment]",
        "        pass",
        "tests/test_headless_teacher.py::test_it_is_the_same_teacher_each_time_and_draws_nothing",
    ),
    "projection resuming": (
        "trainer.py",
        "            self.distillation.projections.load(resume_from_checkpoint)",
        "            pass",
        "tests/test_distill_trainer.py::test_a_resumed_run_ends_where_an_unbroken_one_does",
    ),
    "key": (
        "cache/key.py",
        "return self.columns[name][example, start : start + self.lengths[example]]",
        "return self.columns[name][example, start:]",
        "tests/cache/test_key.py::test_neither_padding_nor_company_changes_a_key",
    ),
    "codec scale": (
        "cache/codec.py",
        "scales = values.abs().amax(-1) / _STEPS",
        "scales = values.abs().amax() / _STEPS * torch.ones(len(values))",
        "tests/cache/test_codec.py::test_a_row_does_not_depend_on_the_others",
    ),
    "selection": (
        "cache/tokens.py",
        "    eligible = mask.bool()",
        "    eligible = torch.ones_like(mask).bool()",
        "tests/cache/test_tokens.py::test_padding_is_never_chosen",
    ),
    "importance": (
        "students/importance.py",
        "by_example.double().abs().sum(0) * count",
        "by_example.double().sum(0).abs() * count",
        "tests/students/test_importance.py::test_it_equals_the_plain_loop[None-bert]",
    ),
    "copies of pairs": (
        "augmentation/augmenter.py",
        "rows.update({(*row[:column], text, *row[column + 1 :]): None for text in texts})",
        "rows.update({(text,) * len(row): None for text in texts})",
        "tests/augmentation/test_augmenter.py::test_a_pair_is_changed_on_one_side_at_a_time_and_the_rest_is_copied",
    ),
    "words that a batch decides": (
        "augmentation/masked_words.py",
        "if not sure and len(batch) > 1:",
        "if not sure and len(batch) < 1:",
        "tests/augmentation/test_masked_words.py::test_where_logits_are_nearly_equal_a_question_is_asked_alone",
    ),
    "selected tokens' count": (
        "losses/reduction.py",
        "return self.selected[stack].sum().float()",
        "return torch.full((), float(self.selected[stack].numel()), device=self.device)",
        "tests/test_cached_training.py::test_a_selection_is_taught_as_a_plain_loop_does",
    ),
}


def pytest_on(package_root: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *tests],
        cwd=package_root,
        env={**os.environ, "PYTHONPATH": str(package_root)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and tests, in which every test of the table passes."""
    root = tmp_path_factory.mktemp("mutants")
    for name in ("hf_compress", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    done = pytest_on(root, sorted({test for *_, test in MUTATIONS.values()}))
    assert done.returncode == 0, done.stdout[-3000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_line_is_noticed(name: str, copied: Path) -> None:
    file, right, wrong, test = MUTATIONS[name]
    path = copied / "hf_compress" / file
    source = path.read_text()
    assert source.count(right) == 1, f"{file} no longer has the line of this mutation"
    path.write_text(source.replace(right, wrong))
    try:
        done = pytest_on(copied, [test])
    finally:
        path.write_text(source)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "AssertionError" in done.stdout or "assert " in done.stdout, done.stdout[-2000:]
