// A client of protos that are loaded at run time: node client.js PROTO_FOLDER ADDRESS. Prints what came as a line of JSON.
const path = require("path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, address] = process.argv.slice(2);
const files = ["diffusion_service", "server_service"].map((name) => path.join(protos, "denoised/v1", `${name}.proto`));
const definition = loader.loadSync(files, { includeDirs: [protos], longs: Number, oneofs: true, defaults: true });
const { v1 } = grpc.loadPackageDefinition(definition).denoised;
const credentials = grpc.credentials.createInsecure();
const client = new v1.DiffusionService(address, credentials);
const call = client.generate({
  prompt: "In the beginning",
  length: 24,
  sampling: { steps: 8, seed: 1, tweedie: { normalize: true } },
});
const seen = { kinds: [] };
call.on("data", ({ event }) => {
  seen.kinds.push(event.event);
  if (event.event === "accepted") seen.normalize = event.accepted.sampling.tweedie.normalize;
  if (event.event === "result") seen.text = event.result.text;
});
call.on("error", (error) => {
  console.error(error);
  process.exit(1);
});
call.on("end", () => {
  new v1.ServerService(address, credentials).getServer({}, (error, about) => {
    if (error) throw error;
    seen.steps = about.limits.maxSteps;
    console.log(JSON.stringify(seen));
    process.exit(0);
  });
});
