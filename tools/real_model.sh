#!/bin/bash
# All scripts on one pretrained model: the second half of docs/results.md, on a CPU.
#
#     bash tools/real_model.sh HuggingFaceTB/SmolLM2-135M-Instruct              all of them, seed 1
#     bash tools/real_model.sh HuggingFaceTB/SmolLM2-135M-Instruct 2 grpo rloo  seed 2 of two
#
# Runs go to runs/real, one after the other. A run that is complete is not repeated, and one that
# stopped goes on, so the same command can be given again. This prints the table:
#
#     python -m tools.table runs/real/sft runs/real/*-seed1
set -e
model=${1:?the model: a folder, or a name on the hub} seed=${2:-1}
scripts=("${@:3}")
[ ${#scripts[@]} -gt 0 ] || scripts=(grpo rloo reinforce_pp ppo reinforce raft remax prime trpo dpo orpo ppo_learned)
real=runs/real measure=
[ -x /usr/bin/time ] && measure="/usr/bin/time -f %M"  # the last line of $real/NAME.txt: KB
words="--data words --max_new_tokens 48"
start="--model $real/sft $words --eval_prompts 64"

run() {  # FOLDER SCRIPT FLAGS...
    [ -e "$real/$1/test.json" ] && return
    if [ -e "$real/$1/config.json" ]; then set -- "$1" "$2" --resume "$real/$1"
    else set -- "$@" --out_dir "$real/$1"; fi
    echo "python ${*:2}"
    $measure python "${@:2}" > "$real/$1.txt" 2>&1
}

pairs() {  # FOLDER, and how many prompts are answered 8 times
    [ -e "$real/$1" ] || python -m tools.make_pairs $start --prompts "$2" --out_dir "$real/$1"
}

mkdir -p $real
# RLHF in four commands: demonstrations, a reward model, PPO with it, PPO with the true score.
run sft sft.py --model "$model" $words --steps 120 --minibatch_size 16 --micro_batch_size 16 --lr 1e-4 \
    --eval_prompts 64 --eval_every 40 --save_every 40

# From here on, all of them start from the policy of sft.py. 12 steps of 64 completions.
batch="$start --steps 12 --prompts_per_step 16 --group_size 4 --seed $seed"
online="$batch --minibatch_size 32 --lr 1e-5"
ppo="ppo.py $online --kl_coef 0.01 --critic_lr 5e-5"
for script in "${scripts[@]}"; do
    out=$script-seed$seed
    case $script in
        ppo_learned)
            pairs pairs 640
            run reward_model reward_model.py --model $real/sft --data $real/pairs \
                --max_new_tokens 48 --steps 32 --minibatch_size 16 --eval_prompts 64 --lr 3e-5
            run $out $ppo --reward $real/reward_model ;;
        ppo) run $out $ppo ;;
        prime) run $out prime.py $online --prm_lr 2e-5 ;;
        raft) run $out raft.py $online --minibatch_size 16 ;;
        remax) run $out remax.py $online --kl_coef 0.01 --group_size 3 --minibatch_size 24 ;;
        reinforce) run $out reinforce.py $batch --kl_coef 0.01 --lr 2e-5 ;;
        trpo) run $out trpo.py $start --steps 6 --prompts_per_step 32 --group_size 4 \
            --kl_coef 0.01 --delta 0.005 --seed $seed ;;
        dpo | orpo)
            pairs few_pairs 96
            run $out $script.py --model $real/sft --data $real/few_pairs --max_new_tokens 48 \
                --eval_prompts 64 --minibatch_size 16 --micro_batch_size 16 --lr 1e-5 --seed $seed ;;
        *) run $out $script.py $online --kl_coef 0.01 ;;
    esac
done
