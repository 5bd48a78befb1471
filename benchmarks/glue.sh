#!/usr/bin/env bash
# The real table: GLUE tasks and a real pretrained encoder, on a CPU. Every row is one command of the README.
#
#   GLUE=/path/to/glue MODEL=/path/to/all-MiniLM-L6-v2 OUT=/path/for/models benchmarks/glue.sh [row ...]
#
# GLUE is a folder in which `load_dataset("nyu-mll/glue", TASK)` and `evaluate.load("glue", TASK)` resolve; anywhere with a hub will do.
# Without rows all are run, in order (hours on two cores); a row that has its eval_results.json is skipped. Rows: teacher drop distil recipes
# mud.
# bf16 is autocast: on CPUs with AVX512-BF16 it trains 2.6 times as fast; leave it out (PRECISION="") for float32.
set -euo pipefail
: "${GLUE:?}" "${MODEL:?}" "${OUT:?}"
TASKS=${TASKS:-"mrpc rte"} SEEDS=${SEEDS:-"42 43 44"} PRECISION=${PRECISION---bf16 True}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) && cd "$GLUE"

train() { # NAME TASK MODEL flags...
    local name=$1 task=$2 model=$3
    shift 3
    [ -f "$OUT/$name/eval_results.json" ] && return
    # shellcheck disable=SC2086
    hf-compress run glue --task_name "$task" --model_name_or_path "$model" --output_dir "$OUT/$name" --do_train --do_eval \
        --per_device_train_batch_size 16 --pad_to_max_length False --save_strategy no --report_to none --use_cpu True $PRECISION "$@"
}

teacher() { # float32: its score is what the others are measured against
    for task in $TASKS; do PRECISION="" train "teacher-$task" "$task" "$MODEL" --learning_rate 5e-5 --num_train_epochs 3 --seed 42; done
}

drop() {
    local plain="--learning_rate 5e-5 --num_train_epochs 3 --seed 42 --num_layers_to_drop 2"
    for task in $TASKS; do
        for strategy in top symmetric bottom alternate alternate_odd contribution; do
            # shellcheck disable=SC2086
            train "drop-$strategy-$task" "$task" "$MODEL" --layer_drop_strategy "$strategy" $plain
        done
    done
    for task in $TASKS; do
        # shellcheck disable=SC2086
        train "drop-top-from-teacher-$task" "$task" "$OUT/teacher-$task" --layer_drop_strategy top $plain
    done
}

distil() {
    for task in $TASKS; do
        [ -d "$OUT/student4-$task" ] || hf-compress student "$OUT/teacher-$task" -o "$OUT/student4-$task" --num_hidden_layers 4
        [ -d "$OUT/student3-$task" ] || hf-compress student "$OUT/teacher-$task" -o "$OUT/student3-$task" --layers_to_keep 2,4,6
        local with="--trainer_class DistillTrainer --teacher_model_name_or_path $OUT/teacher-$task --learning_rate 1e-4"
        for seed in $SEEDS; do
            # shellcheck disable=SC2086
            train "distil4-$seed-$task" "$task" "$OUT/student4-$task" $with --num_train_epochs 3 --seed "$seed"
            # shellcheck disable=SC2086
            train "distil3-$seed-$task" "$task" "$OUT/student3-$task" $with --num_train_epochs 6 --seed "$seed"
        done
    done
}

recipes() { # beside distil's rows of four layers, which have the default recipe, layerwise; none is fine-tuning on the labels alone
    for seed in $SEEDS; do
        for task in $TASKS; do
            train "recipe-none-$seed-$task" "$task" "$OUT/student4-$task" --learning_rate 1e-4 --num_train_epochs 3 --seed "$seed"
            for recipe in logits distilbert tinybert pkd; do
                train "recipe-$recipe-$seed-$task" "$task" "$OUT/student4-$task" --trainer_class DistillTrainer --distill_recipe "$recipe" \
                    --teacher_model_name_or_path "$OUT/teacher-$task" --learning_rate 1e-4 --num_train_epochs 3 --seed "$seed"
            done
        done
    done
}

mud() { # how much of the teacher's hidden states is enough; a study goes on where it was stopped
    for task in $TASKS; do
        [ -d "$OUT/student3-$task" ] || hf-compress student "$OUT/teacher-$task" -o "$OUT/student3-$task" --layers_to_keep 2,4,6
        # shellcheck disable=SC2086
        hf-compress study glue --output_dir "$OUT/study-$task" --study_parts ends --arms 1l_10t_0.1h,2l_50t_0.5h --seeds "${SEEDS// /,}" \
            --teacher_model_name_or_path "$OUT/teacher-$task" --model_name_or_path "$OUT/student3-$task" --task_name "$task" \
            --do_train --do_eval --distill_phases intermediate=4,prediction=2 --teacher_cache_dtype float16 --per_device_train_batch_size 32 --learning_rate 1e-4 \
            --pad_to_max_length False --report_to none --use_cpu True $PRECISION
    done
}

for row in "${@:-teacher}"; do "$row"; done
[ $# -gt 0 ] || { drop; distil; recipes; mud; }
