#!/usr/bin/env bash
# transformers' own examples/pytorch/text-classification/run_glue.py and run_classification.py, unmodified, under `hf-compress run`.
# Each case is run for a few steps and held against the exit code and the line that it must print; exit code 1 if one fails.
#
#   RUN_GLUE=... RUN_CLASSIFICATION=...   the two scripts
#   GLUE=...      a folder where load_dataset("nyu-mll/glue", "mrpc") and evaluate.load("glue", "mrpc") find their data
#   MODEL=...     a pretrained encoder with 6 layers;  TEACHER=... the same, fine-tuned on MRPC
#   PYTHON=python OUT=a new folder ONLY='cache|distil'   (a regular expression: just these cases)
set -u
: "${RUN_GLUE:?}" "${RUN_CLASSIFICATION:?}" "${GLUE:?}" "${MODEL:?}" "${TEACHER:?}"
PYTHON=${PYTHON:-python}
OUT=${OUT:-$(mktemp -d)}
export HF_HUB_OFFLINE=1
mkdir -p "$OUT"
cd "$GLUE" || exit 1
failed=0

case_() { # case_ NAME EXIT_CODE "TEXT THAT IT PRINTS" COMMAND...
  local name=$1 expected=$2 text=$3 start=$SECONDS code
  shift 3
  [[ $name =~ ${ONLY:-.} ]] || return 0
  "$@" >"$OUT/$name.log" 2>&1
  code=$?
  if [ $code -eq "$expected" ] && { [ -z "$text" ] || grep -qF -- "$text" "$OUT/$name.log"; }; then
    printf 'ok    %-28s %3d s  %s\n' "$name" $((SECONDS - start)) \
      "$(grep -oE 'eval_(accuracy|pearson) += +[0-9.-]+' "$OUT/$name.log" | tr -s ' ')"
  else
    failed=1
    printf 'FAIL  %-28s exit code %d, expected %d and "%s": %s\n' "$name" $code "$expected" "$text" "$OUT/$name.log"
  fi
}

run() { "$PYTHON" -m hf_compress.run "$@"; }
distil=(--trainer_class DistillTrainer --teacher_model_name_or_path "$TEACHER" --layer_drop_strategy top)
few=(--max_train_samples 96 --max_eval_samples 32 --per_device_train_batch_size 16 --logging_steps 2 --report_to none)
mrpc=(--model_name_or_path "$MODEL" --task_name mrpc "${few[@]}")

# The scripts alone, for comparison, and with layers dropped or a teacher.
case_ glue_plain 0 eval_accuracy "$PYTHON" "$RUN_GLUE" "${mrpc[@]}" --do_train --do_eval --max_steps 2 --output_dir "$OUT/glue_plain"
case_ glue_drop 0 "kept 1-2 and 5-6 of 6" run "$RUN_GLUE" "${mrpc[@]}" --do_train --do_eval --max_steps 2 \
  --layer_drop_strategy symmetric --output_dir "$OUT/glue_drop"
case_ glue_regression 0 "kept 1-3 and 5 of 6" run "$RUN_GLUE" --model_name_or_path "$MODEL" --task_name stsb "${few[@]}" --do_train \
  --do_eval --do_predict --max_predict_samples 8 --max_steps 2 --layer_drop_strategy alternate --output_dir "$OUT/glue_regression"

# Distillation to 6 steps; the same resumed at step 4 must end with the same weights and the same log
# (the score of the teacher stands in the first entry of each run).
steps=(--do_train --do_eval --max_steps 6 --save_strategy steps --save_steps 4 "${distil[@]}")
case_ glue_distil 0 "kept 1-4 of 6" run "$RUN_GLUE" "${mrpc[@]}" "${steps[@]}" --output_dir "$OUT/glue_distil"
case_ glue_resume 0 "Resuming training from checkpoint" run "$RUN_GLUE" "${mrpc[@]}" "${steps[@]}" --output_dir "$OUT/glue_resume" \
  --resume_from_checkpoint "$OUT/glue_distil/checkpoint-4"
case_ glue_resume_same_weights 0 "" cmp "$OUT/glue_distil/model.safetensors" "$OUT/glue_resume/model.safetensors"
case_ glue_resume_same_log 0 "" "$PYTHON" - "$OUT/glue_distil" "$OUT/glue_resume" <<'PY'
import json, sys
whole, resumed = (
    next(e for e in reversed(json.load(open(f"{folder}/trainer_state.json"))["log_history"]) if "loss" in e) for folder in sys.argv[1:]
)
whole, resumed = ({name: value for name, value in entry.items() if not name.startswith("teacher_")} for entry in (whole, resumed))
print(whole, resumed, sep="\n")
sys.exit(whole != resumed)
PY
case_ glue_resume_other_drop 2 "asks for another drop" run "$RUN_GLUE" "${mrpc[@]}" --do_train --max_steps 6 --output_dir "$OUT/other" \
  --layer_drop_strategy symmetric --resume_from_checkpoint "$OUT/glue_distil/checkpoint-4"

# The teacher on disk: built and trained from, by the flags alone; then by another run that loads no teacher; and not of other data.
disk=(--trainer_class DistillTrainer --teacher_cache_dir "$OUT/cache" --layer_drop_strategy top)
case_ glue_cache_built 0 "hidden states 1l_10t_0.1h" run "$RUN_GLUE" "${mrpc[@]}" "${steps[@]:0:4}" "${disk[@]}" --hsk 1l_10t_0.1h \
  --teacher_model_name_or_path "$TEACHER" --output_dir "$OUT/glue_cache_built"
case_ glue_cache_read 0 "teacher on disk: $OUT/cache, 96 examples" run "$RUN_GLUE" "${mrpc[@]}" "${steps[@]:0:4}" "${disk[@]}" \
  --output_dir "$OUT/glue_cache_read"
case_ glue_cache_same_weights 0 "" cmp "$OUT/glue_cache_built/model.safetensors" "$OUT/glue_cache_read/model.safetensors"
case_ glue_cache_other_data 2 "are not in the teacher on disk" run "$RUN_GLUE" "${mrpc[@]}" --do_train --max_steps 2 "${disk[@]}" \
  --max_seq_length 64 --output_dir "$OUT/glue_cache_other"

# What was saved, evaluated: with the flags of the training, without hf_compress, and with another drop.
saved=(--model_name_or_path "$OUT/glue_distil" --task_name mrpc --do_eval --max_eval_samples 32 --report_to none)
case_ eval_same_flags 0 "records this drop already" run "$RUN_GLUE" "${saved[@]}" "${distil[@]}" --output_dir "$OUT/eval_same_flags"
case_ eval_without 0 eval_accuracy "$PYTHON" "$RUN_GLUE" "${saved[@]}" --output_dir "$OUT/eval_without"
case_ eval_other_drop 2 "has had layers dropped already" run "$RUN_GLUE" "${saved[@]}" --layer_drop_strategy symmetric \
  --output_dir "$OUT/eval_other"

# run_classification.py on files made from MRPC: labels 0 and 1, the teacher's names (sorted, that is in another order), and other names.
"$PYTHON" - "$OUT" >"$OUT/files.log" 2>&1 <<'PY' || { cat "$OUT/files.log"; exit 1; }
import sys
from datasets import load_dataset
for split, rows in load_dataset("nyu-mll/glue", "mrpc").items():
    table = rows.to_pandas()[["sentence1", "sentence2", "label"]]
    table.to_csv(f"{sys.argv[1]}/{split}.csv", index=False)
    for file, names in {"named": ["not_equivalent", "equivalent"], "other": ["no", "yes"]}.items():
        if split != "test":
            named = table.assign(label=[names[i] for i in table["label"]])
            named.to_json(f"{sys.argv[1]}/{file}_{split}.json", orient="records", lines=True)
PY
files() { files=(--train_file "$OUT/$1train.$2" --validation_file "$OUT/$1validation.$2"); }
pairs=(--model_name_or_path "$MODEL" "${few[@]}" --do_train --do_eval --max_steps 2 --max_seq_length 128)
columns=(--text_column_names sentence1,sentence2 --text_column_delimiter "[SEP]" --label_column_name label --metric_name accuracy)
columns+=(--shuffle_train_dataset)
files "" csv
case_ classification_plain 0 eval_accuracy "$PYTHON" "$RUN_CLASSIFICATION" "${pairs[@]}" "${columns[@]}" "${files[@]}" \
  --output_dir "$OUT/c_plain"
case_ classification_drop 0 "kept 1-2 and 5-6 of 6" run "$RUN_CLASSIFICATION" "${pairs[@]}" "${columns[@]}" "${files[@]}" \
  --layer_drop_strategy symmetric --output_dir "$OUT/c_drop"
case_ classification_distil 0 "Labels could not be compared by name" run "$RUN_CLASSIFICATION" "${pairs[@]}" "${columns[@]}" "${files[@]}" \
  "${distil[@]}" --output_dir "$OUT/c_distil"
files named_ json
case_ classification_names 0 "put right by name" run "$RUN_CLASSIFICATION" "${pairs[@]}" "${columns[@]}" "${files[@]}" "${distil[@]}" \
  --output_dir "$OUT/c_names"
case_ glue_file_names 0 "put right by name" run "$RUN_GLUE" "${pairs[@]}" "${files[@]}" "${distil[@]}" --output_dir "$OUT/g_names"
files other_ json
case_ classification_other_names 2 "their predictions cannot be compared" run "$RUN_CLASSIFICATION" "${pairs[@]}" "${columns[@]}" \
  "${files[@]}" "${distil[@]}" --output_dir "$OUT/c_other"

# Help and mistakes.
train=("${mrpc[@]}" --do_train --max_steps 2 --output_dir "$OUT/mistake")
case_ help 0 "flags of $RUN_GLUE" run "$RUN_GLUE" --help
case_ typo_in_flag 1 "did you mean --layer_drop_strategy" run "$RUN_GLUE" "${train[@]}" --layer_drop_stratgy top
case_ typo_in_value 2 "Did you mean 'top'?" run "$RUN_GLUE" "${train[@]}" --layer_drop_strategy tpo
case_ no_such_script 2 "There is no script" run "${RUN_GLUE}x" "${train[@]}" --layer_drop_strategy top
case_ no_teacher 2 "needs a teacher" run "$RUN_GLUE" "${train[@]}" --trainer_class DistillTrainer
case_ no_such_teacher 2 "no such folder" run "$RUN_GLUE" "${train[@]}" --trainer_class DistillTrainer \
  --teacher_model_name_or_path "$OUT/nowhere"
case_ teacher_alone 2 "add --trainer_class DistillTrainer" run "$RUN_GLUE" "${train[@]}" --teacher_model_name_or_path "$TEACHER"
exit $failed
