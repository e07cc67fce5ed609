"""Running one main function in one or more processes, on GPUs or on the CPU."""

from __future__ import annotations

import logging
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from .setup import InputError, prepare


def launch(main: Callable[[Namespace], object], args: Namespace) -> None:
    """Call `main(args)` in `args.num_gpus` (or `args.num_processes`) processes on this machine.

    Bad input ends the program with a message in place of a traceback. detectron2's own launcher
    runs the GPUs; on a machine with GPUs it could not run CPU processes.

    Args:
        main: a function that can be imported, since processes are spawned.
        args: of `argument_parser`.
    """
    try:
        processes, on_gpu = _processes(args)
        url = _meeting_point(args, processes)
        if processes * args.num_machines == 1:
            main(args)
            return
        # Bad input is reported once, here, and not by every process.
        prepare(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.checked = True
    try:
        if on_gpu:
            detectron2_launch(
                main, processes, args.num_machines, args.machine_rank, dist_url=url, args=(args,)
            )
        else:
            mp.start_processes(_cpu_process, nprocs=processes, args=(main, args, processes, url))
    except mp.ProcessRaisedException as error:
        # The exception of a process arrives as the text of its traceback.
        _, marker, message = str(error).rpartition(f"{InputError.__module__}.InputError: ")
        if not marker:
            raise
        print(f"error: {message.strip()}", file=sys.stderr)
        sys.exit(2)


def _processes(args: Namespace) -> tuple[int, bool]:
    if args.num_processes < 0 or args.num_gpus < 0:
        raise InputError("--num-gpus and --num-processes cannot be negative")
    if args.num_processes > 0:
        return args.num_processes, False
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = max(args.num_gpus, 1)
    if gpus == 0:
        if wanted > 1:
            logging.getLogger(__name__).warning(
                "No GPU is available: --num-gpus %d runs as many processes on the CPU.", wanted
            )
        return wanted, False
    if wanted > gpus:
        raise InputError(f"--num-gpus {wanted}, but this machine has {gpus} (visible) GPUs")
    return wanted, True


def _meeting_point(args: Namespace, processes: int) -> str:
    if not 0 <= args.machine_rank < args.num_machines:
        raise InputError(
            f"--machine-rank {args.machine_rank} is not in 0 to {args.num_machines - 1} "
            "(--num-machines - 1)"
        )
    if args.dist_url != "auto":
        return args.dist_url
    if args.num_machines > 1:
        raise InputError(
            "--num-machines needs --dist-url, the same on all machines: an address of the first "
            "that the others reach, e.g. tcp://10.0.0.1:29500"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _cpu_process(
    local_rank: int,
    main: Callable[[Namespace], object],
    args: Namespace,
    processes: int,
    url: str,
) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    dist.init_process_group(
        "gloo",
        init_method=url,
        world_size=processes * args.num_machines,
        rank=args.machine_rank * processes + local_rank,
        timeout=DEFAULT_TIMEOUT,
    )
    comm.create_local_process_group(processes)
    comm.synchronize()
    main(args)
    dist.destroy_process_group()
