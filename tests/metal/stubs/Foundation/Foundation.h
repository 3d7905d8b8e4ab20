// Foundation.h - as much of Apple's Foundation as ggml-metal-device.m needs to be parsed, for clang -fsyntax-only on any machine.
//
// SPDX-License-Identifier: MIT

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#define TARGET_OS_OSX     1
#define TARGET_OS_IOS     0
#define TARGET_OS_TV      0
#define TARGET_OS_IPHONE  0
#define TARGET_CPU_X86_64 0
#define __MAC_OS_X_VERSION_MAX_ALLOWED 150000

typedef long          NSInteger;
typedef unsigned long NSUInteger;
typedef signed char   BOOL;
typedef struct { NSUInteger location, length; } NSRange;

#define YES ((BOOL) 1)
#define NO  ((BOOL) 0)
#define nil ((id) 0)

NSRange NSMakeRange(NSUInteger location, NSUInteger length);

__attribute__((objc_root_class)) @interface NSObject
+ (instancetype) alloc;
- (instancetype) init;
- (instancetype) retain;
- (void) release;
- (id) copy;
@end

@protocol NSObject
- (void) release;
- (instancetype) retain;
@end

@protocol NSCopying
@end

typedef struct { unsigned long state; id __unsafe_unretained * itemsPtr; unsigned long * mutationsPtr; unsigned long extra[5]; }
    NSFastEnumerationState;

@protocol NSFastEnumeration
- (NSUInteger) countByEnumeratingWithState: (NSFastEnumerationState *) state
                                   objects: (id __unsafe_unretained []) buffer count: (NSUInteger) n;
@end

// a method that is not declared is a warning and returns id: only what is used as something else stands here
@interface NSString : NSObject <NSCopying>
+ (instancetype) stringWithUTF8String: (const char *) text;
+ (instancetype) stringWithFormat: (NSString *) format, ...;
- (const char *) UTF8String;
- (int) intValue;
- (BOOL) isEqualToString: (NSString *) other;
@property (readonly) NSUInteger length;
@end

@interface NSMutableString : NSString
@end

@interface NSConstantString : NSString
@end

@interface NSNumber : NSObject <NSCopying>
+ (NSNumber *) numberWithInt: (int) n;
+ (NSNumber *) numberWithBool: (BOOL) b;
- (int) intValue;
@end

@interface NSArray<T> : NSObject <NSFastEnumeration>
+ (instancetype) arrayWithObjects: (const T []) objects count: (NSUInteger) n;
- (T) objectAtIndexedSubscript: (NSUInteger) i;
- (NSUInteger) count;
@end

@interface NSMutableArray<T> : NSArray<T>
@end

@interface NSSet<T> : NSObject <NSFastEnumeration>
- (BOOL) containsObject: (T) object;
@end

@interface NSMutableSet<T> : NSSet<T>
@end

@interface NSDictionary<K, V> : NSObject <NSFastEnumeration>
+ (instancetype) dictionaryWithObjects: (const V []) values forKeys: (const K []) keys count: (NSUInteger) n;
- (V) objectForKeyedSubscript: (K) key;
@end

@interface NSMutableDictionary<K, V> : NSDictionary<K, V>
- (void) setObject: (V) value forKeyedSubscript: (K) key;
@end

@interface NSError : NSObject
- (NSString *) localizedDescription;
@property (readonly) NSString * domain;
@property (readonly) NSInteger code;
@end

@interface NSCharacterSet : NSObject
@end

@interface NSScanner : NSObject
- (BOOL) scanString: (NSString *) text intoString: (NSString **) to;
- (BOOL) scanUpToString: (NSString *) text intoString: (NSString **) to;
@property (copy) NSCharacterSet * charactersToBeSkipped;
@end

@interface NSFileManager : NSObject
+ (NSFileManager *) defaultManager;
- (BOOL) isReadableFileAtPath: (NSString *) path;
@end

@interface NSLock : NSObject
@end

@interface NSBundle : NSObject
@end

@interface NSURL : NSObject
@end

@interface NSProcessInfo : NSObject
+ (NSProcessInfo *) processInfo;
- (NSDictionary<NSString *, NSString *> *) environment;
@end

enum { NSUTF8StringEncoding = 4 };
extern NSString * const NSLocalizedDescriptionKey, * const NSFileType, * const NSFileTypeSymbolicLink;

// dispatch
typedef NSObject * dispatch_queue_t, * dispatch_group_t, * dispatch_semaphore_t;
enum { QOS_CLASS_DEFAULT = 21, QOS_CLASS_USER_INITIATED = 25 };
#define DISPATCH_TIME_NOW     0ull
#define DISPATCH_TIME_FOREVER (~0ull)
dispatch_group_t     dispatch_group_create(void);
dispatch_queue_t     dispatch_get_global_queue(long priority, unsigned long flags);
void                 dispatch_group_async(dispatch_group_t group, dispatch_queue_t queue, void (^block)(void));
long                 dispatch_group_wait(dispatch_group_t group, unsigned long long timeout);
dispatch_semaphore_t dispatch_semaphore_create(long value);
long                 dispatch_semaphore_wait(dispatch_semaphore_t semaphore, unsigned long long timeout);
long                 dispatch_semaphore_signal(dispatch_semaphore_t semaphore);
void                 dispatch_release(NSObject * object);

// mach
typedef int           kern_return_t;
typedef unsigned      vm_map_t;
typedef unsigned long vm_address_t;
enum { KERN_SUCCESS = 0, VM_FLAGS_ANYWHERE = 1 };
vm_map_t      mach_task_self(void);
kern_return_t vm_allocate  (vm_map_t map, vm_address_t * address, size_t size, int flags);
kern_return_t vm_deallocate(vm_map_t map, vm_address_t address, size_t size);
