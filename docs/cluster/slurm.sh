#!/bin/bash
# Training on several machines with Slurm: sbatch slurm.sh
#
# One task a machine starts a process for each of its GPUs. Two minutes before the time limit, and at a preemption, all
# processes get a SIGTERM, save and end with 75; the job is queued again and continues. So it does after a process died
# or hung. Not measured: this project has run several processes on the CPU only.
#SBATCH --job-name=stage1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

export HF_HUB_OFFLINE=1 # download models and cache samples beforehand, to folders that all machines see
GPUS=${SLURM_GPUS_ON_NODE:-8}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' train \
    refine-control train sd3/balanced_stage1 --run-dir runs/stage1 \
    --set data.labeled=runs/cache/labeled --set training.engine=fsdp2 \
    --nproc "$GPUS" --nodes "$SLURM_NNODES" --master "$MASTER"
code=$?

case $code in
0 | 1 | 2 | 65 | 69 | 70) ;; # done, or what a repetition does not change
*) [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ] && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
