"""A client of generated code: python client.py PROTO_FOLDER ADDRESS. Prints what came as one line of JSON."""

import json
import pathlib
import sys
import tempfile

import grpc
from grpc_tools import protoc

protos, address = pathlib.Path(sys.argv[1]), sys.argv[2]
generated = tempfile.mkdtemp()
files = [str(path) for path in protos.glob("denoised/v1/*.proto")]
options = [f"--proto_path={protos}", f"--python_out={generated}", f"--grpc_python_out={generated}"]
if protoc.main(["protoc", *options, *files]) != 0:
    sys.exit("the protos do not compile")
sys.path.insert(0, generated)

from denoised.v1 import (  # noqa: E402
    diffusion_service_pb2 as diffusion,
    diffusion_service_pb2_grpc as diffusion_grpc,
    sampling_pb2 as sampling,
    server_service_pb2 as server,
    server_service_pb2_grpc as server_grpc,
)

channel = grpc.insecure_channel(address)
request = diffusion.GenerateRequest(
    prompt="In the beginning",
    length=24,
    sampling=sampling.Sampling(steps=8, seed=1, tweedie=sampling.Tweedie(normalize=True)),
)
kinds, text, accepted = [], None, None
for answer in diffusion_grpc.DiffusionServiceStub(channel).Generate(request, timeout=60):
    kind = answer.event.WhichOneof("event")
    kinds.append(kind)
    if kind == "accepted":
        accepted = answer.event.accepted
    if kind == "result":
        text = answer.event.result.text
about = server_grpc.ServerServiceStub(channel).GetServer(server.GetServerRequest())
print(json.dumps({"kinds": kinds, "text": text, "normalize": accepted.sampling.tweedie.normalize, "steps": about.limits.max_steps}))
