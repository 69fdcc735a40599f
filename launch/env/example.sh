# shellcheck shell=bash disable=SC2034  # read by launch/slurm/
# Settings of one cluster. Copy this file to launch/env/<site>.sh, change it, and submit with SITE=<site>, or keep it
# anywhere and submit with SITE_FILE=<path>. It is read when a run is submitted and again at every start of the job, so
# `module load` and exported variables (NCCL_*, proxies) belong here, too. Write `NAME=${NAME:-value}` for what a
# user may set for one submission: TIME=2:00:00 SITE=example launch/slurm/pretrain_gpt2_xl_8gpus.sh

# --- required -------------------------------------------------------------------------------------------------------

PARTITION=${PARTITION:-gpu}
TIME=${TIME:-24:00:00}                                # time limit of one start, as sbatch takes it; runs go on after it
PYTHON=${PYTHON:-"${ROOT:?}/.venv/bin/python3"}       # on the compute nodes, inside the container where there is one

# --- what is asked of Slurm -----------------------------------------------------------------------------------------

ACCOUNT=${ACCOUNT:-}                                  # empty: the user's default
CPUS_PER_TASK=${CPUS_PER_TASK:-12}                    # cores for each GPU; empty: Slurm's default
GPU_OPTION=${GPU_OPTION-"--gpus-per-node="}           # followed by the number: `--gres=gpu:h100:` on other clusters.
                                                      # Empty: no GPUs, the ranks run on cores
EXCLUDE=${EXCLUDE:-}                                  # nodes never to be used
SBATCH_ARGS=(--exclusive --mem=0)                     # further options of sbatch
SRUN_ARGS=()                                          # further options of the srun that starts the ranks: --mpi=none

# --- time limit and requeue (docs/slurm.md has the rules) -----------------------------------------------------------

SIGNAL_SECONDS=${SIGNAL_SECONDS:-300}                 # before the time limit: stop and save. More than a step and a
                                                      # checkpoint take, plus STOP_MARGIN
STOP_MARGIN=${STOP_MARGIN:-60}                        # of these, for ending ranks that have not stopped, and the requeue
MAX_REQUEUES=${MAX_REQUEUES:-20}                      # starts after the first one, for whatever reason
MAX_STALLED=${MAX_STALLED:-2}                         # of these in a row without a new checkpoint
MAX_FAILURES=${MAX_FAILURES:-0}                       # failed starts (status 1, a lost node) that are tried again
WAIT_SECONDS=${WAIT_SECONDS:-120}                     # from the first rank's end until the others are killed

# --- health check before every start --------------------------------------------------------------------------------

HEALTH_CHECK=${HEALTH_CHECK:-1}                       # 0: none
HEALTH_TIMEOUT=${HEALTH_TIMEOUT:-300}                 # seconds; importing Python packages from a cold disk takes some
HEALTH_RETRIES=${HEALTH_RETRIES:-0}                   # submissions of the same job that exclude the nodes found bad
MIN_GPU_FREE=${MIN_GPU_FREE:-0.9}                     # of each GPU's memory
MIN_DISK_GIB=${MIN_DISK_GIB:-100}                     # free where the run folder is
MAX_CLOCK_SKEW=${MAX_CLOCK_SKEW:-5}                   # seconds between nodes

# --- where recipes are checked, before anything is queued -----------------------------------------------------------

SUBMIT_PYTHON=${SUBMIT_PYTHON:-$PYTHON}               # on the machine that submits: Python 3.10 with PyYAML is enough
GPU_MEMORY_GIB=${GPU_MEMORY_GIB:-}                    # of one GPU: refuses recipes that need more (needs torch,
                                                      # megatron-core and deepspeed there). Empty: not checked

# --- container ------------------------------------------------------------------------------------------------------

CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-}              # empty: none; pyxis, apptainer or singularity
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}                  # /images/opus.sqsh, registry#name:tag, or a .sif file
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}                # from:to,from:to beside the checkout, the working directory and
                                                      # output_dir, which are always mounted: the data
CONTAINER_ARGS=()                                     # further options: --no-container-mount-home

# --- the environment of job and ranks -------------------------------------------------------------------------------

# module load cuda/12.8
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
