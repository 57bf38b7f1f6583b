"""The fake training worker: each step adds the learning rate to one B weight, and a counter is its optimizer state."""

import asyncio
import json
import os
import sys

import numpy as np
import uvicorn
from safetensors.numpy import load_file, save_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from art_engine_kit.checkpoint_folder import read_manifest, saving
from art_engine_kit.groups_file import read_groups
from art_engine_kit.training_wire import WORKER_TOKEN, TrainJob

from .orders import logprob_of, order

TOKEN = os.environ.pop(WORKER_TOKEN, "")
state = {"busy": False}


def train(job, poison):
    """Gives the folder once the adapter is in it, and then, once the checkpoint is whole, the loss."""
    tensors = load_file(job.start / "adapter_model.safetensors")
    counter = (
        int(load_file(job.start / "optimizer.safetensors")["count"][0])
        if (job.start / "optimizer.safetensors").exists()
        else 0
    )
    name = next(n for n in sorted(tensors) if "lora_B" in n)
    before = logprob_of(job.start)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] += np.nan if poison else job.options.learning_rate * (1 + counter)
    with saving(job.destination, step=job.step, base_model="fake", engine="fake") as folder:
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_bytes((job.start / "adapter_config.json").read_bytes())
        yield folder
        save_file({"count": np.array([counter + 1])}, folder / "optimizer.safetensors")
        after = logprob_of(folder)
        prompt = {"token_ids": [1, 2], "expected": {"7": after}, "previous": {"7": before}}
        if not poison:
            (folder / "canary.json").write_text(json.dumps({"prompts": [prompt]}))
    yield float(tensors[name][0, 0])


def carry(job):
    with saving(job.destination, step=job.step, base_model="fake", engine="fake") as folder:
        for name in read_manifest(job.start).files:
            (folder / name).write_bytes((job.start / name).read_bytes())


async def jobs(request):
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        return JSONResponse({}, 401)
    if state["busy"]:
        return JSONResponse({"error": "busy"}, 409)
    job = TrainJob.model_validate_json(await request.body())
    state["busy"] = True

    async def events():
        try:
            while order("only_alive"):
                yield line(event="alive")
                await asyncio.sleep(0.05)
            groups = read_groups(job.groups_file)
            print(f"job begun {job.model}@{job.step}", flush=True)
            yield line(event="started", num_sequences=len(groups), num_rows=1, packed_tokens=1, trained_tokens=1)
            if order("crash"):
                print("the fake worker was ordered to crash", flush=True)
                os._exit(9)
            while order("hold_train"):
                await asyncio.sleep(0.02)
                if await request.is_disconnected():
                    return
            yield line(event="progress", done=1, total=1)
            if order("fail"):
                yield line(event="failed", error_type="OSError", message=order("fail"))
                return
            if order("nothing_to_train"):
                carry(job)
                yield line(event="saved", path=str(job.destination))
                yield line(event="ended", metrics={"data/step_num_gradient_steps": 0})
                return
            if order("save_nothing"):
                yield line(event="ended", metrics={"data/step_num_gradient_steps": 1})
                return
            work = train(job, order("poison"))
            folder = next(work)
            if job.tell_written and order("tell_written"):
                yield line(event="adapter_written", folder=str(folder), prompts=[[1, 2]])
                while order("hold_save"):
                    await asyncio.sleep(0.02)
                    if await request.is_disconnected():
                        work.close()
                        return
            if order("fail_save"):
                work.close()
                yield line(event="failed", error_type="OSError", message=order("fail_save"))
                return
            loss = next(work)
            yield line(event="gradient_step", index=0, total=1, metrics={"loss/train": loss})
            yield line(event="saved", path=str(job.destination))
            yield line(event="ended", metrics={"loss/train": loss, "data/step_num_gradient_steps": 1})
        finally:
            state["busy"] = False

    return StreamingResponse(events(), media_type="application/x-ndjson")


def line(**event):
    return json.dumps(event) + "\n"


async def health(request):
    return JSONResponse({"status": "training" if state["busy"] else "idle"})


app = Starlette(routes=[Route("/health", health), Route("/jobs", jobs, methods=["POST"])])

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), loop="asyncio", log_level="warning")
