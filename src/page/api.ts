// The server that this page came from, over gRPC-Web.
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import type { Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { signal } from "@preact/signals";
import { DiffusionService } from "./made/denoised/v1/diffusion_service_pb";
import { ModelService } from "./made/denoised/v1/model_service_pb";

/** What went wrong, in words; empty while nothing has. */
export const problem = signal("");
/** The caller's token: in memory alone, and gone with the page. */
export const token = signal("");
/** Why a token is asked for; empty while none is. */
export const tokenAsked = signal("");

const authorize: Interceptor = (next) => async (request) => {
  if (token.value !== "") request.header.set("authorization", `Bearer ${token.value}`);
  return next(request);
};

const transport = createGrpcWebTransport({ baseUrl: location.origin, interceptors: [authorize] });

export const diffusion = createClient(DiffusionService, transport);
export const models = createClient(ModelService, transport);

/** A call that failed, in words; asks for a token where that is what it lacked. */
export function told(error: unknown): string {
  const { code, rawMessage } = ConnectError.from(error);
  if (code === Code.Unauthenticated) {
    tokenAsked.value = token.value === "" ? "This server wants a token." : "The server does not know this token.";
    return "A token is needed.";
  }
  if (isGone(error)) return `The server cannot be reached (${rawMessage}).`;
  return rawMessage === "" ? Code[code] : rawMessage;
}

/** Whether the server is gone, or going, so that the call can be made again. */
export function isGone(error: unknown): boolean {
  const known = error instanceof ConnectError ? error.code : undefined;
  // A connection that breaks off has no status: the library calls it unknown or internal, by where it broke.
  const broke = /fetch|network|missing trailer|stream|premature/i.test(ConnectError.from(error).rawMessage);
  return known === undefined || known === Code.Unavailable || ((known === Code.Unknown || known === Code.Internal) && broke);
}

/** Whether a call was ended by whoever made it. */
export function isStopped(error: unknown): boolean {
  return ConnectError.from(error).code === Code.Canceled;
}
