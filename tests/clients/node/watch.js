// Watches text come out of noise: node watch.js ADDRESS "My name is" 6 "." (numbers are gaps of so many tokens), after
// `npm install` in this folder.
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const protos = path.join(__dirname, "../../../proto");
const definition = loader.loadSync("denoised/v1/diffusion_service.proto", {
  includeDirs: [protos],
  longs: String,
  defaults: true,
  oneofs: true,
});
const { DiffusionService } = grpc.loadPackageDefinition(definition).denoised.v1;

const [address, ...parts] = process.argv.slice(2);
const template = parts.map((part) => (/^\d+$/.test(part) ? { gap: { positions: Number(part) } } : { text: part }));

async function main() {
  const client = new DiffusionService(address, grpc.credentials.createInsecure());
  // Every state that changed something, with its text.
  const frames = { when: "WHEN_ON_CHANGE", minIntervalMs: 0 };
  const call = client.infill({ template, sampling: { seed: 1 }, frames });
  try {
    for await (const { event } of call) {
      const { accepted, frame, result } = event;
      if (accepted) console.log(`${accepted.model.name}@${accepted.model.version}, seed ${accepted.sampling.seed}`);
      if (frame) console.log(`${String(frame.step).padStart(4)}/${frame.total}  ${frame.text}`);
      if (result) console.log(result.text);
    }
  } finally {
    client.close();
  }
}

main().catch((error) => {
  // The server's own words, which name the field that is wrong.
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
