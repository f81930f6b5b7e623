#!/bin/bash
# {{name}}: {{nodes}} nodes with {{gpus}} {{chip}} each; one process on a node has all of its GPUs.
#
#   sbatch slurm.sh      queues it; its output goes to {{name}}-JOB.log where this was typed
#   scancel JOB          ends it; the same file queued again goes on from the last checkpoint
#
# The container is started by Pyxis (srun --container-image). Without Pyxis, drop those three lines and let the last one
# begin with `apptainer exec --nv --bind={{shared}} IMAGE`.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{gpus}}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={{time}}
#SBATCH --account={{account}}
#SBATCH --partition={{partition}}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# A preempted job, and one whose node is lost, is queued again by Slurm.
#SBATCH --requeue
# So many seconds before the time is up every process is told to stop: it finishes its step, saves and ends with 75.
#SBATCH --signal=TERM@{{grace_seconds}}

# What NCCL says: WARN is errors only; INFO shows the rings and which network they use, the first thing to read when
# several nodes are slower than one.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where nodes have several networks, NCCL_SOCKET_IFNAME and NCCL_IB_HCA name the ones to use.
# JAX takes this share of a GPU's memory at the start; NCCL's buffers and the CUDA context need the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Compiler flags: messages beside matmuls is what the latency-hiding scheduler is for. Others: --train.compiler_options.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

# --kill-on-bad-exit=0: one that has saved and ends with 75 must not kill those that are still saving.
# --wait: whoever hangs that long after the first one's end is killed.
# --cpus-per-task: a step is given one core unless it asks for all of the node's.
srun --kill-on-bad-exit=0 --wait={{wait_seconds}} --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none \
  --container-image={{image}} \
  --container-mounts={{shared}}:{{shared}} \
  --no-container-mount-home \
  {{command}}
status=$?

case $status in
  0) exit 0 ;;            # trained to the end
  2 | 3 | 130) exit $status ;; # wants you: a setting to mend, a diagnosis to read, or you stopped it
esac
# 75 (told to stop, or lost a peer), killed, or crashed: the same again, from the last checkpoint.
if ((${SLURM_RESTART_COUNT:-0} < {{restarts}})); then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
