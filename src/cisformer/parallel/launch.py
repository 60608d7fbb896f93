"""Re-run a command under `accelerate launch` where the Accelerate config asks for several processes.

The file is the one that `generate_default_config` writes (JSON inside YAML, as Accelerate reads it). What it asks for
is compared with what the machine has: missing devices give a warning and the devices that are there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cisformer.config import read_yaml
from cisformer.errors import ConfigError, TrainingError, brief
from cisformer.runtime.device import fastest_precision

logger = logging.getLogger(__name__)
DEFAULT_CONFIG = Path("cisformer_config/accelerate_config.yaml")
_INSIDE = "CISFORMER_LAUNCHED"
COMMAND = ["-m", "cisformer"]


def accelerate_config(n_gpus: int, *, mps: bool = False, precision: str = "no") -> dict[str, Any]:
    """Return an Accelerate config for a machine with `n_gpus` CUDA devices, with the keys of the documentation."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU" if n_gpus > 1 else "MPS" if mps else "NO",
        "downcast_bf16": False,
        "gpu_ids": ",".join(map(str, range(n_gpus))) if n_gpus else "all",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": precision,
        "num_machines": 1,
        "num_processes": max(1, n_gpus),
        "rdzv_backend": "static",
        "same_network": True,
        "tpu_use_cluster": False,
        "tpu_use_sudo": False,
        "use_cpu": not n_gpus and not mps,
        "main_process_port": 29934,
    }


def detect_accelerate_config() -> dict[str, Any]:
    """Return the Accelerate config that fits this machine."""
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    device = "cuda" if n_gpus else "mps" if mps else "cpu"
    return accelerate_config(n_gpus, mps=mps, precision=fastest_precision(torch.device(device)))


def read_accelerate_config(path: str | Path) -> dict[str, Any]:
    """Read an Accelerate config file.

    Raises
    ------
    ConfigError
        It is missing or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"there is no Accelerate config {path}",
            hint="make one with `cisformer generate_default_config` or `accelerate config`",
        )
    content = read_yaml(path, "one that `accelerate config` makes")
    if not content:
        raise ConfigError(
            f"the Accelerate config {path} holds no keys", hint="compare it with a generated one"
        )
    for key in ("num_processes", "num_machines"):
        if not isinstance(content.get(key) or 1, int):
            raise ConfigError(f"{path}: {key} is {brief(content[key])}", hint="it should be a whole number")
    return content


def wants_cpu(config: dict[str, Any]) -> bool:
    """Whether the config says to stay on the CPU."""
    return bool(config.get("use_cpu", False))


def n_usable_processes(config: dict[str, Any], n_gpus: int) -> int:
    """Return how many processes to start; warn where the config names devices that are not there."""
    wanted = processes_here(config)
    if wants_cpu(config):
        return wanted
    named = [d for d in str(config.get("gpu_ids", "all")).split(",") if d.strip().isdigit()]
    missing = [d for d in named if int(d) >= n_gpus]
    distributed = config.get("distributed_type", "NO") not in ("NO", "MPS")
    if (missing or wanted > n_gpus) and (distributed or n_gpus):
        found = f"{n_gpus} GPU{'s' if n_gpus != 1 else ''}" if n_gpus else "no GPU"
        logger.warning(
            "the Accelerate config asks for %s, this machine has %s: running on %s",
            f"GPU {', '.join(named)}" if named else f"{wanted} processes", found, "one GPU" if n_gpus else "the CPU",
        )  # fmt: skip
        return 1
    return wanted


def relaunched(config_path: str | Path | None) -> tuple[bool, bool]:
    """Run this very command under `accelerate launch` if its config asks for it.

    Parameters
    ----------
    config_path
        The Accelerate config; `None` for `cisformer_config/accelerate_config.yaml` if it is there.

    Returns
    -------
    done, cpu
        Whether other processes did the work, and whether the config says to stay on the CPU.
    """
    if config_path is None and not DEFAULT_CONFIG.is_file():
        return False, False
    path = Path(config_path or DEFAULT_CONFIG)
    config = read_accelerate_config(path)
    if os.environ.get(_INSIDE) or "LOCAL_RANK" in os.environ:
        return False, wants_cpu(config)
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several_machines = int(config.get("num_machines") or 1) > 1
    precision = config.get("mixed_precision")
    if precision in ("no", "bf16", "fp16"):
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", precision)
    if n_usable_processes(config, n_gpus) == 1 and not several_machines:
        return False, wants_cpu(config)
    os.environ[_INSIDE] = "1"
    if wants_cpu(config):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes_here(config))))
    _launch(path, config)
    return True, wants_cpu(config)


def _launch(path: Path, config: dict[str, Any]) -> None:
    """Run this command in as many processes as the config says; exit if one of them fails.

    The process that failed has printed its error, unless it was killed; the launcher's own messages are hidden.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    command = [*COMMAND, *sys.argv[1:]]  # a list: no shell reads it
    try:
        if wants_cpu(config):
            run(parse_args([*cpu_arguments(config), *command]))
        else:
            launch_command(launch_command_parser().parse_args(["--config_file", str(path), *command]))
    except ChildFailedError as failed:
        killed = [f for f in failed.failures.values() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
        if killed:
            raise TrainingError(
                f"process {killed[0].local_rank} was killed by {signal.Signals(-killed[0].exitcode).name}",
                hint="if memory ran out, lower batch_size, or start fewer processes",
            ) from None
        sys.exit(1)
    except SignalException as stopped:
        logger.error("stopped by %s; earlier results are as they were", stopped.sigval.name)
        sys.exit(128 + stopped.sigval)


def processes_here(config: dict[str, Any]) -> int:
    """Return how many of the processes an Accelerate config starts on this machine."""
    return max(1, int(config.get("num_processes") or 1) // max(1, int(config.get("num_machines") or 1)))


def cpu_arguments(config: dict[str, Any]) -> list[str]:
    """Return the arguments of torchrun for CPU processes; `accelerate launch` starts only one without MPI."""
    machines = int(config.get("num_machines") or 1)
    processes = ["--nproc_per_node", str(processes_here(config))]
    if machines == 1:
        return [*processes, "--standalone"]
    return [
        *processes, "--nnodes", str(machines), "--node_rank", str(config.get("machine_rank") or 0),
        "--master_addr", str(config.get("main_process_ip") or "127.0.0.1"),
        "--master_port", str(config.get("main_process_port") or 29934),
    ]  # fmt: skip
