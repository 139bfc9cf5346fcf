"""Triton's own client against the Open Inference Protocol: python triton.py ADDRESS. Prints what came as JSON."""

import json
import sys

import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(url=sys.argv[1])


def refused(call):
    """The code and the words of the error that `call` ends with."""
    try:
        call()
    except triton.InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return "not refused"


def infer(tokens, datatype="INT64", outputs=None, **options):
    tensor = triton.InferInput("tokens", list(tokens.shape), datatype)
    tensor.set_data_from_numpy(tokens)
    asked = outputs and [triton.InferRequestedOutput(name) for name in outputs]
    return client.infer("world-english", [tensor], outputs=asked, **options)


metadata = client.get_model_metadata("world-english", as_json=True)
canvases = np.full((3, 24), -1, dtype=np.int64)
canvases[:, 0] = [11, 12, 13]
canvases[1, 20:] = 7
parameters = {"seed": 5, "steps": 8, "sampler": "tweedie", "temperature": 0.9, "top_p": 1}
filled = infer(canvases, request_id="mine", parameters=parameters)
again = infer(canvases[1].astype(np.int32), "INT32", ["tokens"], parameters={**parameters, "seed": 6})
early = infer(np.full((1, 128), -1), parameters={"steps": 4096, "finish_early": True}, timeout=500_000)

print(
    json.dumps(
        {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready("world-english"),
            "version_ready": client.is_model_ready("world-english", "1"),
            "unknown_ready": client.is_model_ready("nobody"),
            "server": client.get_server_metadata(as_json=True),
            "metadata": metadata,
            "index": client.get_model_repository_index(as_json=True),
            "answer": {
                "name": filled.get_response().model_name,
                "version": filled.get_response().model_version,
                "id": filled.get_response().id,
                "seed": filled.get_response().parameters["seed"].int64_param,
                "finished_early": filled.get_response().parameters["finished_early"].bool_param,
            },
            "tokens": filled.as_numpy("tokens").tolist(),
            "log_probabilities": filled.as_numpy("log_probabilities").tolist(),
            "nfe": filled.as_numpy("nfe").tolist(),
            "again": again.as_numpy("tokens").tolist(),
            "again_outputs": [output.name for output in again.get_response().outputs],
            "early": {
                "finished_early": early.get_response().parameters["finished_early"].bool_param,
                "nfe": early.as_numpy("nfe").tolist(),
                "tokens": early.as_numpy("tokens").tolist(),
            },
            "refused": {
                "model": refused(lambda: client.get_model_metadata("nobody")),
                "version": refused(lambda: client.is_model_ready("world-english", "new")),
                "length": refused(lambda: infer(np.full((1, 129), -1))),
                "token": refused(lambda: infer(np.array([[3, 700_000, -1]]))),
                "nothing to fill": refused(lambda: infer(np.array([[3, 4]]))),
                "type": refused(lambda: infer(np.ones((1, 8), dtype=np.float32), "FP32")),
                "output": refused(lambda: infer(canvases, outputs=["logits"])),
                "parameter": refused(lambda: infer(canvases, parameters={"stepz": 8})),
                "steps": refused(lambda: infer(canvases, parameters={"steps": 0})),
                "priority": refused(lambda: infer(canvases, priority=1)),
                "load": refused(lambda: client.load_model("world-english")),
                "unload": refused(lambda: client.unload_model("world-english")),
                "config": refused(lambda: client.load_model("world-english", config="{}")),
                "not ours": refused(lambda: client.get_inference_statistics()),
            },
        }
    )
)
