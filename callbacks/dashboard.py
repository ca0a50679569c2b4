"""What wandb and TensorBoard get beside the figures: losses of each step, and what was fitted on what."""

from typing import Any

from pytorch_lightning import Callback, Trainer

from patchad.callbacks.publish import dashboards
from patchad.conformal import conformal_threshold
from patchad.detector import Detector


class Dashboard(Callback):
    """Logs the terms of the loss of each step, and puts limits, promised rate and data into the config of the run."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Detector, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the step; `trainer.log_every_n_steps` says of how many steps one."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = {f"{name}_step": float(value) for name, value in pl_module.terms.items()}
            for logger in dashboards(trainer):
                logger.log_metrics(values, step=trainer.global_step)

    def on_test_start(self, trainer: Trainer, pl_module: Detector) -> None:
        """Describes what is tested."""
        describe(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: Detector, stage: str) -> None:
        """Describes what was fitted."""
        if stage == "fit" and len(pl_module.scorer.normals):
            describe(trainer, pl_module)


def describe(trainer: Trainer, detector: Detector) -> None:
    """Puts limits, rates and data into the config of each dashboard."""
    scorer, data = detector.scorer, trainer.datamodule  # type: ignore[attr-defined]
    _, promised = conformal_threshold(scorer.normals.cpu().numpy(), scorer.target_fpr)
    described = {
        "limits": scorer.limits._asdict(),
        "false_positive_rate": {"asked": scorer.target_fpr, "promised": promised},
        "images": {"root": str(data.root), "normal": len(scorer.normals), "test": len(data.test_set)},
        "updates": list(detector.model.updates),
    }
    for logger in dashboards(trainer):
        logger.log_hyperparams(described)
