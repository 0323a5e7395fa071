// Writes index.html: the sources of src/ and the libraries they use, inlined into one file with the libraries' licences.
// The fingerprint of the sources goes in too, so that a test without node can tell a stale artefact.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const LICENSE_FILE = /^licen[cs]e/i;

const result = await build({
  entryPoints: ["src/main.js", "src/style.css"],
  bundle: true,
  minify: true,
  format: "iife",
  target: ["chrome111", "firefox115", "safari16.4"],
  legalComments: "none",
  metafile: true,
  outdir: "out",
  write: false,
});

function output(extension) {
  return result.outputFiles.find((file) => file.path.endsWith(extension)).text.trim();
}

function bundledPackages() {
  const used = Object.values(result.metafile.outputs).flatMap((out) =>
    Object.entries(out.inputs)
      .filter(([, input]) => input.bytesInOutput > 0)
      .map(([path]) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1]),
  );
  return [...new Set(used)].filter(Boolean).sort();
}

function licence(name) {
  const folder = `node_modules/${name}`;
  const { version } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  const file = readdirSync(folder).find((entry) => LICENSE_FILE.test(entry));
  if (!file) throw new Error(`${name}: no licence file`);
  return `${name} ${version}\n\n${readFileSync(`${folder}/${file}`, "utf8").trim()}`;
}

function fingerprint() {
  const hash = createHash("sha256");
  const sources = readdirSync("src").sort().map((name) => `src/${name}`);
  for (const path of ["build.js", "package-lock.json", "package.json", ...sources]) {
    hash.update(`${path}\n`).update(readFileSync(path));
  }
  return hash.digest("hex");
}

const parts = {
  fingerprint: fingerprint(),
  licences: bundledPackages().map(licence).join(`\n\n${"-".repeat(80)}\n\n`),
  style: output(".css"),
  script: output(".js").replaceAll("</script", "<\\/script"),
};
const page = readFileSync("src/index.html", "utf8").replace(/\{\{(\w+)\}\}/g, (_, name) => parts[name]);
writeFileSync("index.html", page);
console.log(`index.html: ${Buffer.byteLength(page)} bytes, with ${bundledPackages().join(", ")}`);
