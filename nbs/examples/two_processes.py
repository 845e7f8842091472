"""SAM in several processes: torchrun --nproc_per_node=2 two_processes.py [--sync] [--shards 2]

Lines that a script for a single process does not have end in `# <-`.
"""
import argparse
import gc
import os
import torch.distributed as dist                                        # <-
from torch.nn.parallel import DistributedDataParallel                   # <-
from fastai.basics import *
from sam_explained.data import digits
from sam_explained.msam import MSAM, shards
from sam_explained.sam import SAM


class OwnPart(Callback):                                                # <-
    "Each process trains on its own part of every batch; for parts of equal size, the batch size must be a multiple"
    order, run_valid = TrainEvalCallback.order + 1, False               # <-
    def before_batch(self):                                             # <-
        world, batch = dist.get_world_size(), (self.xb, self.yb)        # <-
        self.learn.xb, self.learn.yb = shards(batch, world)[dist.get_rank()]  # <-


def train(args):
    gpu = torch.cuda.is_available()
    device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if gpu else torch.device('cpu')
    if gpu: torch.cuda.set_device(device)
    set_seed(args.seed)                  # the same batches everywhere
    dls = digits(bs=64, seed=args.seed, device=device)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    model = DistributedDataParallel(model, device_ids=[device.index] if gpu else None)  # <-
    method = partial(MSAM, args.shards) if args.shards else SAM
    cbs = [method(rho=0.1, sync=args.sync), OwnPart()]
    learn = Learner(dls, model, opt_func=SGD, lr=0.1, metrics=accuracy, cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(args.epochs)
        score = learn.validate()[1]      # in every process: fastai averages over all of them
    if dist.get_rank() == 0:                                            # <-
        print(f'{dist.get_world_size()} processes, {args.epochs} epochs: accuracy {score:.4f}')
        torch.save(get_model(learn.model).state_dict(), args.out)       # <-


parser = argparse.ArgumentParser()
parser.add_argument('--epochs', type=int, default=5)
parser.add_argument('--sync', action='store_true', help='average the ascent gradient: SAM of the whole batch')
parser.add_argument('--shards', type=int, help='MSAM instead of SAM: so many shards in each process')
parser.add_argument('--seed', type=int, default=42)
parser.add_argument('--out', default='two_processes.pt', help='file for the weights')

if __name__ == '__main__':
    args = parser.parse_args()
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')  # <-
    try: train(args)
    finally:
        gc.collect()                     # or the learner, which is in a circle, would hold on to the group
        dist.destroy_process_group()                               # <-
