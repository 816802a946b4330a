"""A page for the browser: move the number of tokens, see what a bundle makes of it.

    python -m lgm_scale.web BUNDLE

A generator bundle samples; one with a tokenizer, of whatever kind, reconstructs pictures of yours.
The page is for this machine (127.0.0.1), asks no other one for anything, and reports to nobody.
It needs Gradio: pip install 'lgm-scale[web]'.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lgm_scale.bundle import local_bundle, read_info
from lgm_scale.errors import ConfigError, LGMError, MissingAssetError, exit_on_user_error
from lgm_scale.families.base import add_import_option
from lgm_scale.families.generator import generator_families
from lgm_scale.sampling.config import SamplerConfig

if TYPE_CHECKING:
    import numpy as np

    from lgm_scale.pipeline import Pipeline
    from lgm_scale.protocols import ImageTokenizer

MOST_PICTURES = 16
ONLY_OURS = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)
"""Content policy: the browser asks nobody but this server, whatever Gradio's page names."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lgm_scale.web",
        description="Serve a page that samples from a bundle, or reconstructs pictures with it.",
    )
    parser.add_argument(
        "bundle",
        help="generator or tokenizer bundle, owner/name on the hub, or demo: the package's",
    )
    parser.add_argument("--device", help="default: a CUDA device if there is one")
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="address to listen on; another than 127.0.0.1 lets others in, without a password",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="0 picks a free one; default 7860")
    add_import_option(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port: {args.port} must be from 0 to 65535")
    return args


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises: ConfigError if there can be none."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = str(error.strerror).split(" (while")[0]
        raise ConfigError(
            f"--port: {port} of {host} cannot be had ({reason}); --port 0 picks a free one, and "
            "--host 127.0.0.1 is this machine"
        ) from error


# --- what the page does ---------------------------------------------------------------------------


def token_counts(pipe: Pipeline) -> list[int]:
    """Every K at which a generator samples, ascending."""
    found = []
    for num_tokens in range(1, pipe.num_base_tokens + 1):
        try:
            pipe.check(SamplerConfig(), num_tokens)
        except LGMError:
            continue
        found.append(num_tokens)
    return found


def sample(
    pipe: Pipeline, num_tokens: int, name: str, seed: int, count: int, scale: float, points: int
) -> tuple[np.ndarray, str]:
    """Images uint8 [B, S, S, 3] of one class, and what one of them costs.

    `points` are those of the time grid. Raises: ConfigError, CheckpointError.
    """
    settings: dict[str, Any] = {"cfg_scale": scale, "num_steps": points}
    config = pipe.config(num_tokens, **settings)
    images = pipe([name] * count, num_tokens, seed=seed, progress_bar=False, **settings)
    work, most = (pipe.image_flops(config, k) for k in (num_tokens, pipe.num_base_tokens))
    decoder = " and the decoder" if pipe.decoder_flops() else ""
    return images, (  # type: ignore[return-value]  # arrays are the default
        f"**{work / 1e9:.4g} GFLOPs per image** at K = {num_tokens}: {config.num_forwards()} "
        f"network rows{decoder}; {work / most:.0%} of the operations at K = "
        f"{pipe.num_base_tokens} with these settings"
    )


def reconstruct(tokenizer: ImageTokenizer, file: str, num_tokens: int) -> tuple[Any, Any, str]:
    """An image file as the tokenizer sees it, its reconstruction, and the PSNR between them.

    Both are uint8 [S, S, 3]. Raises: DataError, ConfigError.
    """
    import numpy as np
    import torch

    from lgm_scale.data.decoding import center_crop, decode_image
    from lgm_scale.pixels import psnr, to_uint8, to_unit_range

    tokenizer.merging.check(num_tokens)
    picture = np.array(center_crop(decode_image(file, "the picture"), tokenizer.image_size))
    original = torch.from_numpy(picture).permute(2, 0, 1)[None]
    with torch.inference_mode():
        device = next(iter(tokenizer.parameters())).device
        z = tokenizer.merging.full_length(
            tokenizer.encode(to_unit_range(original).to(device)), num_tokens
        )
        result = to_uint8(tokenizer.decode(z)).cpu()
    found = f"**PSNR {psnr(original, result).item():.2f} dB** at K = {num_tokens}"
    return picture, result[0].permute(1, 2, 0).numpy(), found


# --- the page -------------------------------------------------------------------------------------


def build_page(title: str, pipe: Pipeline | None, tokenizer: ImageTokenizer | None) -> Any:
    """The page as Gradio's `Blocks`: a tab for what each of the two can do."""
    import gradio as gr

    with gr.Blocks(analytics_enabled=False, title=title, fill_width=True) as page:
        gr.Markdown(f"## {title}")
        if pipe is not None:
            with gr.Tab("Sample"):
                _sampling_tab(gr, pipe)
        if tokenizer is not None:
            with gr.Tab("Reconstruct"):
                _reconstruction_tab(gr, tokenizer)
    return page


def _slider(gr: Any, values: list[int], chosen: int, label: str) -> Any:
    """A slider over these numbers; they need not be evenly spaced, and the others are refused."""
    step = math.gcd(*(value - values[0] for value in values))
    only = {} if step else {"interactive": False}
    return gr.Slider(
        values[0] - (not step), values[-1], chosen, step=step or 1, label=label, **only
    )


def _sampling_tab(gr: Any, pipe: Pipeline) -> None:
    highest = pipe.num_base_tokens

    def defaults(num_tokens: float) -> tuple[float, int]:
        config = pipe.default_config(int(num_tokens))
        return round(config.cfg_scale, 2), config.num_steps

    scale, points = defaults(highest)
    tokens = _slider(gr, token_counts(pipe), highest, "K, number of tokens")
    with gr.Row():
        name = gr.Dropdown(list(pipe.classes), value=pipe.classes[0], label="class")
        seed = gr.Number(0, precision=0, minimum=0, label="seed")
        count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="pictures")
    with gr.Row():
        guidance = gr.Slider(
            1,
            max(20.0, 2 * scale),
            scale,
            step=0.1,
            label="guidance (1: off; moving K sets K's own)",
        )
        steps = gr.Slider(
            2, max(250, points), points, step=1, label="points of the time grid (steps + 1)"
        )
    button = gr.Button("Sample", variant="primary")
    work = gr.Markdown()
    pictures = gr.Gallery(label="pictures", format="png", columns=4, object_fit="contain")

    def run(*values: Any) -> tuple[list[Any], str]:
        chosen, label, start, number, w, grid = values
        try:
            images, said = sample(
                pipe, int(chosen), label, int(start or 0), int(number), float(w), int(grid)
            )
        except LGMError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return list(images), said

    quietly: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    tokens.change(defaults, tokens, [guidance, steps], api_visibility="private", **quietly)
    inputs = [tokens, name, seed, count, guidance, steps]
    button.click(run, inputs, [pictures, work], api_visibility="private")


def _reconstruction_tab(gr: Any, tokenizer: ImageTokenizer) -> None:
    lengths = list(range(tokenizer.merging.min_tokens, tokenizer.num_base_tokens + 1))
    tokens = _slider(gr, lengths, lengths[-1], "K, number of tokens")
    file = gr.Image(type="filepath", sources=["upload", "clipboard"], label="picture")
    button = gr.Button("Reconstruct", variant="primary")
    quality = gr.Markdown()
    with gr.Row():
        before, after = (gr.Image(label=label, format="png") for label in ("seen", "reconstructed"))

    def run(path: str | None, num_tokens: float) -> tuple[Any, Any, str]:
        if path is None:
            raise gr.Error("Choose a picture first.", print_exception=False)
        try:
            return reconstruct(tokenizer, path, int(num_tokens))
        except LGMError as error:
            raise gr.Error(str(error), print_exception=False) from error

    button.click(run, [file, tokens], [before, after, quality], api_visibility="private")


def application(page: Any) -> Any:
    """The page as an ASGI application whose answers forbid requests to other servers."""
    import gradio as gr
    from fastapi import FastAPI

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    served = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, "/", footer_links=[], ssr_mode=False, theme=theme
    )

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", ONLY_OURS)
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await served(scope, receive, guarded)

    return answer


def main() -> int:
    """Load a bundle, and serve its page until Ctrl-C."""
    args = parse_args(sys.argv[1:])
    bundle = local_bundle(args.bundle)
    kind = read_info(bundle)["kind"]
    if find_spec("gradio") is None:
        raise MissingAssetError(
            "the page needs Gradio, which is not installed: pip install 'lgm-scale[web]' (in the "
            "checkout: pip install -e '.[web]')"
        )
    with listening(args.host, args.port) as server, TemporaryDirectory() as seen:
        # Read when Gradio is imported. Pictures of the page, and yours, go when it is closed.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": seen}
        import uvicorn

        from lgm_scale.pipeline import load_image_tokenizer, load_pipeline, usable_device

        pipe = load_pipeline(bundle, args.device) if kind in generator_families() else None
        if pipe is not None:
            tokenizer = pipe.tokenizer
        else:
            tokenizer, _ = load_image_tokenizer(bundle, usable_device(args.device))
        page = application(build_page(f"{kind}: {args.bundle}", pipe, tokenizer))
        host, port = server.getsockname()[:2]
        print(f"http://{host}:{port}  (Ctrl-C ends it)", flush=True)
        # An open page keeps its connection for ever; Ctrl-C does not wait for it.
        settings = uvicorn.Config(page, log_level="error", timeout_graceful_shutdown=1)
        try:
            uvicorn.Server(settings).run(sockets=[server])
        except KeyboardInterrupt:
            print("closed")
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
