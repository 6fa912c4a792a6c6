"""What launchers write into the environment of the processes they start, as far as it tells who a process is.

Taken from the launchers' documentation and from what they are seen to set. Names of hosts and jobs are made up.
"""

_JOB = {
    "SLURM_JOB_ID": "200505",
    "SLURM_JOBID": "200505",
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gnode[010-011]",
    "SLURM_NODELIST": "gnode[010-011]",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_CLUSTER_NAME": "ada",
    "SLURM_SUBMIT_HOST": "login1",
}
_STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "gnode[010-011]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.10",
    "SLURM_SRUN_COMM_HOST": "10.1.0.10",
}
SRUN = {**_JOB, **_STEP, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
"""Task 5 of ``srun`` on two nodes with four tasks each."""

SRUN_UNEVEN = {
    **SRUN,
    "SLURM_STEP_NODELIST": "b2,gnode[007,010-011]-ib",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
"""Eight tasks on four nodes, as many as were free on each."""

SRUN_ARRAY = {
    **SRUN,
    "SLURM_ARRAY_JOB_ID": "200505",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "10",
    "SLURM_JOB_ID": "200508",
    "SLURM_JOBID": "200508",
}
"""The same task of an element of a job array."""

SRUN_ONE_HOST = {
    **SRUN,
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NNODES": "1",
    "SLURM_STEP_NODELIST": "gnode010",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
}
"""The fourth step of a job that was requeued twice, on a part of its nodes, with a device for each task."""

SALLOC = {**_JOB, "SLURM_JOB_NAME": "interactive"}
"""The shell that ``salloc`` opens on the machine where it was typed."""

SALLOC_STEP = {
    **SALLOC,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PTY_PORT": "41355",
}
"""The shell that ``salloc`` opens on the first node, where SLURM is set up so (``use_interactive_step``)."""

SRUN_BASH = {
    **SRUN,
    "SLURM_JOB_NAME": "bash",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_PTY_PORT": "41355",
    "SLURM_PTY_WIN_COL": "120",
}
"""The shell of ``srun --pty bash``."""

SRUN_IN_SALLOC = {**SRUN, "SLURM_JOB_NAME": "interactive"}
"""``srun python script.py`` typed into the shell of ``salloc``."""

SBATCH = {**_JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "16360"}
"""A batch script that runs ``python script.py`` without ``srun``."""

SBATCH_ONE = {**SBATCH, "SLURM_NTASKS": "1", "SLURM_NPROCS": "1", "SLURM_TASKS_PER_NODE": "1"}
"""The same with one task."""

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-n1-31337@1",
    "PMIX_RANK": "3",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "23456",
}
"""Open MPI's ``mpirun -n 4 -x MASTER_ADDR=n1 -x MASTER_PORT=23456`` on two hosts."""

OPEN_MPI_IN_SLURM = {
    **SBATCH,
    **{name: value for name, value in OPEN_MPI.items() if not name.startswith("MASTER")},
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
}
"""``mpirun`` inside a job of SLURM: it starts its daemons as a step, and SLURM's numbers are theirs."""

HYDRA = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "PMI_FD": "9",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
"""MPICH's ``mpiexec -n 2`` on one host."""

INTEL_MPI = {
    **HYDRA,
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "I_MPI_MPIRUN": "mpirun",
    "I_MPI_HYDRA_HOST_FILE": "/home/x/hosts",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "23456",
}
"""Intel MPI's ``mpirun -n 4 -ppn 1``: ranks go round two hosts."""

SRUN_PMI = {**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "12"}
"""``srun --mpi=pmi2``."""

JSRUN = {
    "LSB_JOBID": "774411",
    "LSB_JOBINDEX": "0",
    "LSB_JOBNAME": "train",
    "LSB_MCPU_HOSTS": "batch5 1 h41n03 42 h41n04 42",
    "JSM_NAMESPACE_RANK": "7",
    "JSM_NAMESPACE_SIZE": "12",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "6",
    "OMPI_COMM_WORLD_RANK": "7",
    "OMPI_COMM_WORLD_SIZE": "12",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "6",
}
"""``jsrun`` in a job of LSF: two hosts with six tasks each, and a launch node. It sets Open MPI's variables too."""

_POD = {
    "KUBERNETES_PORT": "tcp://10.96.0.1:443",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "PYTHONUNBUFFERED": "0",
    "WORLD_SIZE": "3",
    "MASTER_PORT": "23456",
}
POD_MASTER = {**_POD, "RANK": "0", "MASTER_ADDR": "train-master-0"}
"""The master of a PyTorchJob with two workers."""

POD_WORKER = {**_POD, "RANK": "2", "MASTER_ADDR": "train-master-0"}
"""Its second worker."""

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "3",
    "ROLE_WORLD_SIZE": "4",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "40513",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "0e3a7b1c",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "OMP_NUM_THREADS": "1",
}
"""The last of four ranks of torchrun on two hosts, after a restart."""

TORCHRUN_IN_SLURM = {**SRUN, **TORCHRUN}
"""``srun --ntasks-per-node=1 torchrun ...``."""

TORCHRUN_IN_A_POD = {**POD_WORKER, **TORCHRUN}
"""A PyTorchJob whose pods run torchrun."""

WORLD_SIZE_IN_SRUN = {**SRUN, "WORLD_SIZE": "8", "MASTER_ADDR": "gnode010", "MASTER_PORT": "29501"}
"""A batch script that exports what tutorials export, and ``srun``."""

SHELL = {"HOME": "/home/x", "PATH": "/usr/bin:/bin", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
"""A plain shell; some library has set LOCAL_RANK."""
