"""LearnedOptimizer in other projects' training loops: Hugging Face's Trainer, accelerate, Lightning. Skipped where not installed."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from test_learned_optimizer import values
from torch import nn

from optimizers import LearnedOptimizer, load_optimizer


class Regression(nn.Module):
    """A model as Trainer wants it: it takes the batch and gives the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x, labels):
        output = self.layers(x)
        return {"loss": F.mse_loss(output, labels), "output": output}


def optimizer_of(model):
    return LearnedOptimizer(model.parameters(), load_optimizer("mnist"), lr=0.1)


def samples():
    generator = torch.Generator().manual_seed(2)
    return [{"x": x, "labels": x[:2] / 2} for x in torch.randn(16, 3, generator=generator)]


def loss_of(model):
    with torch.no_grad():
        rows = samples()
        return model(*(torch.stack([row[key] for row in rows]) for key in ("x", "labels")))["loss"].item()


def by_hand(batches, accumulate=1):
    """The same training, written out."""
    model = Regression()
    optimizer = optimizer_of(model)
    for number, batch in enumerate(batches):
        (model(**batch)["loss"] / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model


def batches(size, epochs):
    rows = samples()
    return [
        {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in rows[0]}
        for start in range(0, len(rows), size)
    ] * epochs


# Hugging Face's Trainer -----------------------------------------------------------------------------------------------


def trainer_of(transformers, folder, epochs, accumulate=1):
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Regression()
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs,
        max_grad_norm=0,
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return InOrder(model, arguments, train_dataset=samples(), optimizers=(optimizer, constant)), model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(accumulate, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate, which is not installed")
    trainer, model = trainer_of(transformers, tmp_path / "whole", 4, accumulate)
    before = loss_of(model)
    trainer.train()
    assert loss_of(model) < before
    torch.testing.assert_close(values(model), values(by_hand(batches(4, 4), accumulate)), rtol=1e-5, atol=1e-6)
    first, _ = trainer_of(transformers, tmp_path / "parts", 2 if accumulate == 2 else 1, accumulate)
    first.train()
    assert os.path.isdir(tmp_path / "parts" / "checkpoint-4")
    again, resumed = trainer_of(transformers, tmp_path / "parts", 4, accumulate)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert torch.equal(values(resumed), values(model))


# accelerate -----------------------------------------------------------------------------------------------------------


def accelerated(accelerate, accumulate=1):
    accelerate.state.GradientState._reset_state()  # one for the process: what ran before may have left its own
    accelerator, model = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate), Regression()
    optimizer = optimizer_of(model)
    return accelerator, *accelerator.prepare(model, optimizer)


def accelerated_steps(accelerator, model, optimizer, given):
    for batch in given:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator, model, optimizer = accelerated(accelerate, accumulate)
    before = loss_of(model)
    accelerated_steps(accelerator, model, optimizer, batches(4, 2))
    accelerator.save_state(str(tmp_path))
    kept = copy.deepcopy(values(model))
    accelerated_steps(accelerator, model, optimizer, batches(4, 2))
    assert loss_of(model) < before
    assert torch.equal(values(model), values(by_hand(batches(4, 4), accumulate)))
    accelerator, resumed, optimizer = accelerated(accelerate, accumulate)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(values(resumed), kept)
    accelerated_steps(accelerator, resumed, optimizer, batches(4, 2))
    assert torch.equal(values(resumed), values(model))


# Lightning ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Regression()

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(self)

    def fit(epochs, **options):
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            default_root_dir=str(tmp_path),
        )
        trainer.fit(module, torch.utils.data.DataLoader(samples(), batch_size=4), **options)
        return trainer, module.model

    _, model = fit(4)
    assert loss_of(model) < loss_of(Regression())
    torch.testing.assert_close(values(model), values(by_hand(batches(4, 4), accumulate)), rtol=0, atol=0)
    first, _ = fit(2)
    first.save_checkpoint(tmp_path / "two epochs.ckpt")
    _, resumed = fit(4, ckpt_path=str(tmp_path / "two epochs.ckpt"))
    assert torch.equal(values(resumed), values(model))
