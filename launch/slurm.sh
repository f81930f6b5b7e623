#!/bin/bash
# {{name}}: {{nodes}} nodes with {{gpus}} {{chip}} each; one process on a node has all of its GPUs.
#
#   sbatch slurm.sh      queues it; its output goes to {{name}}-JOB.log where this was typed
#   scancel JOB          ends it; the same file queued again goes on from the last checkpoint
#
# The container is started by Pyxis (srun --container-image). Without Pyxis, drop the lines with --container and
# --no-container, and put `apptainer exec --nv --bind={{shared}} IMAGE` before the `sh` behind them.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{gpus}}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={{time}}
#SBATCH --account={{account}}
#SBATCH --partition={{partition}}
#SBATCH --qos={{qos}}
#SBATCH --reservation={{reservation}}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# A preempted job, and one whose node is lost, is queued again by Slurm.
#SBATCH --requeue
# So many seconds before the time is up every process is told to stop: it finishes its step, saves and ends with 75.
#SBATCH --signal=TERM@{{grace_seconds}}
{{sbatch}}

# What NCCL says: WARN is errors only; INFO shows the rings and which network they use, the first thing to read when
# several nodes are slower than one.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where nodes have several networks, NCCL_SOCKET_IFNAME and NCCL_IB_HCA name the ones to use.
# JAX takes this share of a GPU's memory at the start; NCCL's buffers and the CUDA context need the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Compiler flags: messages beside matmuls is what the latency-hiding scheduler is for. Others: --train.compiler_options.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
# By this a run counts the starts that got nowhere (opendeep_jax/cli/starts.py).
export OPENDEEP_JOB=slurm-$SLURM_JOB_ID
{{exports}}
# Of variables that the image sets too, Pyxis takes the image's unless it is told their names. Values are in no file:
# what is exported where `sbatch` is typed comes along, keys of W&B and Hugging Face too.
names=$(compgen -e | grep -E '^(OPENDEEP|NCCL|XLA|JAX|WANDB|MLFLOW|TRACKIO|HF|HUGGING_FACE|AWS|GOOGLE)_' | paste -sd, -)
names+=,{{env_names}}

# {{local}}: checkpoints on the nodes' own disks, which the container sees under the same path.
srun --ntasks-per-node=1 mkdir -p {{local}}

# --kill-on-bad-exit=0: one that has saved and ends with 75 must not kill those that are still saving.
# --wait: whoever hangs that long after the first one's end is killed.
# --cpus-per-task: a step is given one core unless it asks for all of the node's.
# srun returns the highest status, so the shell in the container puts the telling ones above those of signals: a run's
# own 2, 3 and 130 become 202, 203 and 230, an error (1) is above an abort (134), and an abort, which is what JAX does to
# the others when process 0 has ended, below all. The shell must outlive SIGTERM, which Slurm sends to both.
# shellcheck disable=SC2016  # $@ and $? are that shell's
srun --kill-on-bad-exit=0 --wait={{wait_seconds}} --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none \
  --container-image={{image}} \
  --container-mounts={{mounts}} \
  --container-env="$names" \
  --no-container-mount-home \
  sh -c 'trap : TERM INT; "$@"; s=$?; case $s in 2 | 3) s=20$s ;; 130) s=230 ;; 1) s=136 ;; 134) s=74 ;; esac; exit $s' run \
  {{command}}
status=$?
case $status in
  202 | 203) status=$((status - 200)) ;;
  230) status=130 ;;
  136) status=1 ;;
  74) status=134 ;;
esac

starts=${SLURM_RESTART_COUNT:-0}
newest=$(find {{workdir}}/checkpoints -mindepth 1 -maxdepth 1 -name '[0-9]*' 2>/dev/null | sed 's:.*/::' | sort -n | tail -n 1)
crash={{workdir}}/starts/$OPENDEEP_JOB
case $status in
  0) exit 0 ;;                 # trained to the end
  2 | 3 | 130) exit $status ;; # wants you: a setting to mend, a diagnosis to read, or you stopped it
  75 | 137 | 143)              # told to stop, lost a peer, or killed
    rm -f "$crash"
    ;;
  *) # crashed: once more, as it may be the node. Not where a second start got no further, or one that never began
    [[ $status == 134 && ! -d {{workdir}} ]] && stuck=1 || stuck=0
    if ((starts > 0)) && { [[ ! -d {{workdir}} ]] || [[ $(cat "$crash" 2>/dev/null) == "after step ${newest:-0}" ]]; }; then
      stuck=1
    fi
    if ((stuck)); then
      echo "Not queued again: status $status without progress after step ${newest:-0}. Another start would end so too." >&2
      exit $status
    fi
    [[ -d {{workdir}} ]] && mkdir -p {{workdir}}/starts && echo "after step ${newest:-0}" >"$crash"
    ;;
esac
# The same again, from the last checkpoint.
if ((starts < {{restarts}})); then
  for ((try = 0; try < 5; try++)); do
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    sleep "${POLL_SECONDS:-30}" # Slurm's controller does not answer
  done
  echo "Slurm did not take the job back: give the same sbatch command again, and the run goes on." >&2
fi
exit $status
