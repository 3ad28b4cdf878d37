/** The daemon's HTTP face: a fixed set of pages that are read with GET, nothing else. */
import { createServer } from 'node:http';
import type { IncomingMessage, Server, ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { NetworkAddress } from './config/config.js';

export interface Page {
  readonly status: number;
  readonly contentType: string;
  readonly body: string;
}

/** Pages by path. */
export type Pages = Readonly<Record<string, () => Promise<Page>>>;

/** Scrapers and probes are few; whoever opens more is not one of them. */
const CONNECTIONS_MAX = 64;
const REQUEST_TIMEOUT_MS = 10_000;

export class HttpServer {
  readonly url: string;
  readonly #server: Server;

  private constructor(server: Server) {
    const { address, family, port } = server.address() as AddressInfo;
    this.url = `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`;
    this.#server = server;
  }

  /** Rejects with the error of listen(2), such as EADDRINUSE. */
  static async listen(address: NetworkAddress, pages: Pages): Promise<HttpServer> {
    const server = createServer((request, response) => void answer(pages, request, response));
    server.maxConnections = CONNECTIONS_MAX;
    server.requestTimeout = REQUEST_TIMEOUT_MS;
    server.headersTimeout = REQUEST_TIMEOUT_MS;
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen({ host: address.host, port: address.port }, resolve);
    });
    return new HttpServer(server);
  }

  close(): void {
    this.#server.close();
    this.#server.closeAllConnections();
  }
}

async function answer(pages: Pages, request: IncomingMessage, response: ServerResponse): Promise<void> {
  const page = await find(pages, request);
  const headers = {
    'content-type': page.contentType,
    'content-length': Buffer.byteLength(page.body),
    'cache-control': 'no-store',
  };
  response.writeHead(page.status, headers);
  response.end(request.method === 'HEAD' ? undefined : page.body);
}

async function find(pages: Pages, request: IncomingMessage): Promise<Page> {
  if (request.method !== 'GET' && request.method !== 'HEAD') return text(405, 'only GET and HEAD are answered');
  const path = (request.url ?? '').split('?')[0]!;
  const page = Object.hasOwn(pages, path) ? pages[path] : undefined;
  if (page === undefined) return text(404, `pages: ${Object.keys(pages).join(' ')}`);
  try {
    return await page();
  } catch (error) {
    return text(500, (error as Error).message);
  }
}

function text(status: number, body: string): Page {
  return { status, contentType: 'text/plain; charset=utf-8', body: `${body}\n` };
}
