"""An S3 server for tests, with a bucket `bucket`: prints its address, then obeys what it is told line by line, and answers
`done`: `stop` (connections are refused from then on), `start` (with all that was there before), `fill PREFIX COUNT`
(empty objects), `clear PREFIX`, `cut KEY` (an object loses its second half)."""

import logging
import sys

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)


def serve(port):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


server = serve(0)
host, port = server.get_host_and_port()
address = f"http://{host}:{port}"
s3 = boto3.client(
    "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
)
s3.create_bucket(Bucket="bucket")
# Without a connection for each of thousands of objects.
backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
print(address, flush=True)
for line in sys.stdin:
    command, *arguments = line.split()
    if command == "stop":
        server.stop()
    elif command == "start":
        server = serve(port)
    elif command == "fill":
        prefix, count = arguments
        for number in range(int(count)):
            backend.put_object("bucket", f"{prefix}{number}", b"")
    elif command == "clear":
        (prefix,) = arguments
        for key in list(backend.buckets["bucket"].keys.keys()):
            if key.startswith(prefix):
                backend.delete_object("bucket", key)
    elif command == "cut":
        (key,) = arguments
        whole = s3.get_object(Bucket="bucket", Key=key)["Body"].read()
        s3.put_object(Bucket="bucket", Key=key, Body=whole[: len(whole) // 2])
    print("done", flush=True)
