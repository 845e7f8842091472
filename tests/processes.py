"""Several processes (gloo, CPU) for a test: they meet through a file, so no port can be taken, and none outlives it."""
import datetime
import gc
import os
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def meet(rank, world, folder):
    "In a process: one thread, and the group of all `world` processes that were given this folder."
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=60))


def member(f, rank, world, folder, args):
    "What a process does: `f(rank, *args)`; its value goes to a file, an error with its traceback to another."
    try:
        meet(rank, world, folder)
        try:
            torch.save(f(rank, *args), f'{folder}/value{rank}.pt')
            dist.barrier()
        finally:
            gc.collect()                     # a learner is in a circle, and would hold on to the group
            dist.destroy_process_group()
    except BaseException:
        Path(f'{folder}/error{rank}').write_text(traceback.format_exc())
        raise SystemExit(1)


def in_processes(f, world, folder, *args, seconds=240):
    "The values of `f(rank, *args)` in `world` processes. An AssertionError says which failed, the first one first."
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(['sam_explained.all'])                        # imported once, not once per process
    ps = [ctx.Process(target=member, args=(f, r, world, str(folder), args), daemon=True) for r in range(world)]
    ends = time.monotonic() + seconds
    try:
        with patch.dict(os.environ, OMP_NUM_THREADS='1'):
            for p in ps: p.start()
        while (left := [p for p in ps if p.exitcode is None]) and not any(p.exitcode for p in ps):
            if time.monotonic() > ends: break
            connection.wait([p.sentinel for p in left], timeout=1)
        time.sleep(.5 * any(p.exitcode for p in ps))                         # whoever failed with it may say so too
        codes = [p.exitcode for p in ps]
    finally:
        for p in ps:
            if p.pid:
                p.kill()
                p.join()
    if any(codes): raise AssertionError(_what_failed(codes, Path(folder)))
    late = [r for r, code in enumerate(codes) if code is None]
    if late: raise AssertionError(f'process {late} of {world} did not end within {seconds} s')
    return [torch.load(Path(folder) / f'value{r}.pt', weights_only=False) for r in range(world)]


def _what_failed(codes, folder):
    "One paragraph per process that failed, in the order in which they did; one that was killed leaves no note."
    notes = []
    for r, code in enumerate(codes):
        note = folder / f'error{r}'
        if code: notes.append((note.stat().st_mtime_ns, r, note.read_text()) if note.exists()
                              else (0, r, f'it ended with exit code {code}'))
    return '\n'.join(f'process {r} of {len(codes)} failed:\n{text}' for _, r, text in sorted(notes))
