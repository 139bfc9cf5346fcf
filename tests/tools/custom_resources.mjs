// Checks resources against the schemas that their makers publish: node custom_resources.mjs PACKAGES < DOCUMENTS, where
// DOCUMENTS is a JSON array and PACKAGES the folder of node's packages. Says what is wrong, and what has no schema.

import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const packages = {
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
  "cert-manager.io": "cert-manager",
};
// No package has these: the fields of their makers' definitions that we use.
const reference = { name: /^.{1,253}$/ };
const own = {
  "inference.networking.k8s.io/v1/InferencePool": {
    selector: { matchLabels: {} },
    targetPorts: [{ number: 0 }],
    appProtocol: /^(http|kubernetes\.io\/h2c)$/,
    endpointPickerRef: { ...reference, port: { number: 0 }, failureMode: /^Fail(Open|Close)$/ },
  },
};

// What `value` has that `shape` has not, or has otherwise: of an empty object and of none anything may be in it.
function* wrong(value, shape, path) {
  if (shape instanceof RegExp) {
    if (!shape.test(value)) yield `${path} is ${value}`;
  } else if (Array.isArray(shape)) {
    if (!Array.isArray(value) || value.length === 0) yield `${path} is no list`;
    else for (const [index, item] of value.entries()) yield* wrong(item, shape[0], `${path}[${index}]`);
  } else if (typeof shape === "number") {
    if (!Number.isInteger(value) || value < 1 || value > 65535) yield `${path} is ${value}, no port`;
  } else if (Object.keys(shape).length) {
    for (const key of Object.keys(value)) {
      if (key in shape) yield* wrong(value[key], shape[key], `${path}.${key}`);
      else yield `${path}.${key} is unknown`;
    }
    for (const key of Object.keys(shape)) if (!(key in value)) yield `${path}.${key} is missing`;
  }
}

const folder = resolve(process.argv[2]);
let checked = 0;
const problems = [];
for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const { apiVersion, kind, metadata } = resource;
  const [group, version] = apiVersion.split("/");
  const name = `${kind} ${metadata.name}`;
  const shape = own[`${apiVersion}/${kind}`];
  if (shape) {
    problems.push(...[...wrong(resource.spec, shape, "spec")].map((problem) => `${name}: ${problem}`));
  } else if (packages[group]) {
    const path = join(folder, "@kubernetes-models", packages[group], group, version, `${kind}.js`);
    try {
      new (await import(pathToFileURL(path)))[kind](resource).validate();
    } catch (error) {
      problems.push(`${name}: ${error.message}`);
    }
  } else {
    problems.push(`${name}: nobody knows ${apiVersion}`);
  }
  checked += 1;
}
for (const problem of problems) console.error(problem);
console.log(`${checked} custom resources`);
process.exit(problems.length || !checked ? 1 : 0);
