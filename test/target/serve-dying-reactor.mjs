/** `strata serve` on the config file that is its argument, with reactor threads that die. */
const dist = new URL('../../dist/src/target/', import.meta.url);
const { loadConfig } = await import(new URL('config/load.js', dist));
const { Service } = await import(new URL('service.js', dist));

const { config, source } = loadConfig(process.argv[2]);
await new Service(config, source, new URL('dying-reactor.mjs', import.meta.url)).run(() => undefined);
