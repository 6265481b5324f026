r"""One large step against k small ones from the same weights: the assumption behind the linear rule (Sec. 2.1).

    python recipes/update_magnitude.py --deepspeed_config ds_configs/digits/256.json --data_dir ... \
        --output_dir runs/magnitude --epochs 6

Before each update of kn images, with its learning rate η, from the weights w and the k batches of n images at hand:

    large    Δ = -η · mean of g_j(w)                          one step at kn images
    small    w_j+1 = w_j - (η/k) · g_j(w_j), Δ' = w_k - w     k steps at n images

The rule assumes ∇l(w_j) ≈ ∇l(w), so Δ ≈ Δ'. The log has |Δ|², |Δ'|², |Δ - Δ'|² and the cosine of Δ and Δ'. Then the
weights move by the paper's update, with momentum. Warmup is needed where Δ and Δ' are far apart (Sec. 2.2).
"""

from contextlib import ExitStack
from itertools import islice

from digits import DigitsResNet

from lbsgd.commands.recipe_flags import parser
from lbsgd.commands.simulate import opened, run_simulation


def main():
    run_simulation(parser(__doc__), compare)


def compare(request):
    """Train, and log the two steps before each update."""
    task = DigitsResNet()
    with ExitStack() as stack:
        simulation = opened(request, task, {"model": f"{task.name}, one large step"}, stack)
        server = simulation.server
        for epoch in range(simulation.num_epochs):
            batches = chunks(simulation.train.epoch(epoch), server.num_workers)
            trained = [one_update(server, chunk, simulation.log) for chunk in batches]
            num_images = len(trained) * server.plan.global_batch
            error = {"train_top1_error_pct": 100 * sum(wrong for _, wrong in trained) / num_images}
            loss = {"train_loss": sum(loss for loss, _ in trained) / len(trained)}
            simulation.epoch({"epoch": epoch + 1, **loss, **error, "seconds": 0.0, **server.evaluate(simulation.val)})
        simulation.result()


def one_update(server, chunk, log):
    """Log the two steps and make the paper's update. Return the mean loss and the number of wrong answers."""
    server.network.train()
    position = {"iteration": server.num_moves, "epoch": server.num_moves / server.plan.iterations_per_epoch}
    found = steps(server, chunk)
    trained = [server.synchronously(batch)[:2] for batch in chunk]
    loss = sum(loss for loss, _ in trained) / len(trained)
    speed = {"images_per_second": None, "data_wait_pct": None}
    log.iteration({**position, "train_loss": loss, **speed, **found})
    return loss, sum(wrong for _, wrong in trained)


def chunks(batches, size):
    """Yield `size` batches at a time."""
    batches = iter(batches)
    while chunk := list(islice(batches, size)):
        yield chunk


def steps(server, chunk):
    """Return |Δ|², |Δ'|², |Δ - Δ'|² and the cosine of Δ and Δ' at the current weights, which do not change."""
    import torch

    lr, weights = server.lr(), server.weights
    buffers = [buffer.clone() for buffer in server.network.buffers()]
    before = [weight.detach().clone() for weight in weights]
    for batch in chunk:
        server.gradient(batch, 1 / len(chunk))
    large = [-lr * weight.grad for weight in weights]
    server.optimizer.zero_grad()
    for batch in chunk:
        server.gradient(batch, 1.0)
        with torch.no_grad():
            torch._foreach_add_(weights, [weight.grad for weight in weights], alpha=-lr / len(chunk))
        server.optimizer.zero_grad()
    with torch.no_grad():
        small = torch._foreach_sub([weight.detach() for weight in weights], before)
        torch._foreach_copy_(weights, before)
        torch._foreach_copy_(list(server.network.buffers()), buffers)
        apart = torch._foreach_sub(large, small)
    squares = {"large_sq": dot(large, large), "small_sq": dot(small, small), "apart_sq": dot(apart, apart)}
    lengths = (squares["large_sq"] * squares["small_sq"]) ** 0.5
    return {"lr": lr, **squares, "cosine": dot(large, small) / lengths if lengths else None}  # none at a rate of 0


def dot(left, right):
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


if __name__ == "__main__":
    main()
