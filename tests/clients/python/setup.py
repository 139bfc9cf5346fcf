"""Compiles the protos into the package: what pyproject.toml has no words for."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
PROTOS = HERE / "../../../proto"


class BuildWithProtos(build_py):
    """Puts the generated modules beside the others; their package is `denoised.v1`, as the protos have it."""

    def run(self) -> None:
        super().run()
        from grpc_tools import protoc

        out = pathlib.Path(self.build_lib)
        files = [str(path) for path in sorted(PROTOS.glob("denoised/v1/*.proto"))]
        options = [f"--proto_path={PROTOS}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
        if protoc.main(["protoc", *options, *files]) != 0:
            raise SystemExit("the protos do not compile")


setup(cmdclass={"build_py": BuildWithProtos})
