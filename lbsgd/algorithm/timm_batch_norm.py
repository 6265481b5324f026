"""Per-worker batch norm for timm's layers with an activation; imported only if a timm layer is converted."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from lbsgd.algorithm.per_worker_batch_norm import PerWorkerBatchNorm, PerWorkerBatchNorm2d, as_leaf


class PerWorkerBatchNormAct2d(BatchNormAct2d, PerWorkerBatchNorm2d):
    """`PerWorkerBatchNorm2d`, then timm's own drop and activation; `convert_batch_norm` turns BatchNormAct2d into it.

    It is still a BatchNormAct2d, so that timm recognises it, for example when it freezes batch norms.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_leaf(self, x)
        y: Tensor = self.act(self.drop(PerWorkerBatchNorm.forward(self, x)))
        return y


class PerWorkerSyncBatchNormAct(SyncBatchNormAct, PerWorkerBatchNorm):
    """`PerWorkerBatchNorm`, then drop and activation if it has them; converted from timm's SyncBatchNormAct."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_leaf(self, x)
        y = PerWorkerBatchNorm.forward(self, x)
        for name in ("drop", "act"):
            y = getattr(self, name, nn.Identity())(y)
        return y


KINDS: dict[type[_BatchNorm], type[PerWorkerBatchNorm]] = {
    BatchNormAct2d: PerWorkerBatchNormAct2d,
    SyncBatchNormAct: PerWorkerSyncBatchNormAct,
}
